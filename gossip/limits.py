"""Every bound in one place. Durations are float seconds, sizes bytes."""

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Limits:
    """The bounds of one daemon: they may delay or disconnect a peer, never decide validity."""

    # ---- sizes
    message_bytes: int = 4 << 20
    """Largest message on a link; larger ones are refused before they are parsed."""
    inline_bytes: int = 1024
    """Payloads up to this size travel inside their record."""
    payload_bytes: int = 1 << 30
    """Largest payload ever, whatever a run file says."""
    chunk_bytes: int = 256 << 10
    """Bytes per chunk of a pull: 256 KiB-1 MiB is the fast range of gRPC streaming."""
    genesis_bytes: int = 1 << 20
    """Largest genesis a joiner accepts."""
    log_bytes: int = 16 << 30
    """Disk for the log; beyond it the peer is `degraded: log full`: it serves, never publishes."""
    staging_bytes: int = 1 << 30
    """Payload bytes being pulled and not yet stored, all together."""

    # ---- counts
    members: int = 10_000
    """Peers in the view."""
    ledger_members: int = 512
    """Members of a ledger run (design 3.4): more are refused with a hint to mixing."""
    neighbours: int = 64
    """Open links."""
    links_per_address: int = 16
    """Open incoming links from one IP address."""
    addresses: int = 16
    """Addresses in one contact record, each at most 256 characters."""
    seen: int = 100_000
    """Ids remembered for duplicate suppression."""
    held_records: int = 1024
    """Records kept while their author's admission proof is fetched."""
    recent: int = 2048
    """Records remembered by id, to answer grafts."""
    logs: int = 4096
    """Authors (peer and log) in the frontier."""
    wants: int = 256
    """Ranges asked of one peer after one digest."""
    unordered: int = 4096
    """Updates kept above a hole, all authors together."""
    pulls: int = 16
    """Payloads being fetched at once."""
    push_records: int = 256
    """Records in one Push message."""
    events: int = 1000
    """Events remembered for /events."""

    # ---- membership (SWIM with Lifeguard; defaults of memberlist LAN)
    probe_interval: float = 1.0
    probe_timeout: float = 0.5
    indirect_probes: int = 3
    suspicion_mult: int = 4
    suspicion_max_mult: int = 6
    awareness_max: int = 8
    """Lifeguard's local health multiplier ceiling."""
    keep: float = 3600.0
    """A member failed for longer than this is forgotten; payloads stay at least so long."""
    retry_failed: float = 5.0
    """First interval of dialling failed members again; doubles up to `retry_failed_max`."""
    retry_failed_max: float = 300.0

    # ---- dissemination and repair
    announce_interval: float = 0.2
    graft_timeout: float = 0.5
    """How long an announced record may take to arrive before it is asked for."""
    repair_interval: float = 5.0
    """Anti-entropy with one random peer."""
    pull_timeout: float = 30.0
    """A pull without progress for so long has failed."""
    progress_interval: float = 10.0
    """At least this long between progress records; grows with the swarm (members / 10 s)."""

    join_patience: float = 15.0
    """A peer that knows of others waits so long for one of them before it goes on alone."""
    log_interval: float = 3600.0
    """An author's neighbours take one additional new log of it in so long."""

    # ---- links (node/transport)
    link_queue_bytes: int = 8 << 20
    """Bytes waiting to be sent on one link; gossip beyond them is dropped (it is repaired)."""
    mail_bytes: int = 1 << 20
    """The same for a peer without a link."""
    mails: int = 64
    """Peers without a link that are being called at once."""
    channels: int = 128
    """Open connections to other peers, links included."""
    channel_idle: float = 60.0
    """A connection that nobody used for so long is closed."""
    dial_timeout: float = 5.0
    """One attempt to reach an address, TLS included."""
    handshake_timeout: float = 5.0
    """From connecting to TLS, and again from there to the Hello."""
    snapshot_timeout: float = 120.0
    """A joiner's wait for a snapshot: its donor's worker answers between two turns."""
    call_timeout: float = 5.0
    """One call to a peer without a link."""
    transfer_timeout: float = 3600.0
    """One pull as a whole; it can be resumed (`pull_timeout` bounds the time without progress)."""
    link_age: float = 86_400.0
    """A link is opened anew after so long: every call has a deadline."""
    transfers: int = 64
    """Transfers being served at once; one peer may have a quarter of them."""

    # ---- topology
    degree_min: int = 3
    degree_max: int = 12
    topology_interval: float = 2.0
    """How often the neighbour set is compared with the topology."""

    # ---- pacing
    weight_turns: int = 10
    """Authors heard in this many own turns count in N_w."""
    lockstep_deadline: float = 60.0
    """Lockstep goes on without absentees after this long."""

    # ---- scores
    score_halflife: float = 60.0
    score_throttle: float = -10.0
    score_ban: float = -50.0
    ban: float = 300.0
    """A banned peer is refused for so long."""
    frame_messages: int = 1024
    """Messages in one frame: each costs time however small it is."""
    records_per_second: float = 500.0
    """Token bucket per peer, burst of four seconds."""
    bytes_per_second: float = 64 << 20
    """Token bucket per peer for messages on links (payloads are asked for and not counted)."""
    questions_per_second: float = 1000.0
    """Records that one peer may ask for, burst of twenty seconds; it may ask again for the rest."""
    updates_per_minute: float = 600.0
    """Updates of one author beyond this rate are delayed."""


def lan() -> Limits:
    """Machines in one building or one region."""
    return Limits()


def wan() -> Limits:
    """Home lines and several continents: longer time-outs, slower suspicion."""
    return replace(
        Limits(),
        probe_interval=5.0,
        probe_timeout=3.0,
        suspicion_max_mult=6,
        graft_timeout=2.0,
        repair_interval=10.0,
    )


def sim() -> Limits:
    """The simulator's many peers: as `lan`, with rarer progress."""
    return replace(Limits(), progress_interval=30.0)
