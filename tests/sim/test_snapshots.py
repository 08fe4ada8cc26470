"""Peers that begin with a snapshot in place of the log: equal in the end, whoever lies to them."""

from dataclasses import replace

import pytest

from shoal.gossip import events as ev
from shoal.gossip.frontier import SURE
from shoal.gossip.limits import sim
from shoal.gossip.messages import AskHashes, Digest, Entry, Hashes, Message, Push, Want
from shoal.gossip.names import Author, Key, PeerId, digest
from shoal.gossip.records import Proof, Record, Update
from shoal.node.simulation.faults import Fault, Network
from shoal.node.simulation.peers import SimPeer, fake_seal
from shoal.node.simulation.simulator import Simulator
from shoal.node.simulation.workers import fake_run

pytestmark = pytest.mark.sim


def done(simulator: Simulator) -> bool:
    return all(p.core.turns.finished() for p in simulator.living()) and simulator.converged()


def dropped(simulator: Simulator) -> list[str]:
    return [seen.details["why"] for seen in simulator.happened if seen.what == "snapshot-dropped"]


def check_equal(simulator: Simulator) -> None:
    """The living hold the sum of all contributions, which a peer with the whole log tells."""
    living = simulator.living()
    whole = next(p for p in living if p.snapshot is None)
    expected = simulator.expected_fingerprint(whole)
    assert {p.core.fingerprint for p in living} == {expected}
    assert len({p.core.frontier.hash for p in living}) == 1


def lowest(peer: SimPeer, of: SimPeer) -> int:
    """Return the first number of `of` that is on this peer's disk."""
    return min(key.number for key in peer.records if key.author.peer == of.id)


@pytest.mark.parametrize("seed", range(4))
def test_a_joiner_fetches_only_what_lies_above_its_snapshot(seed: int) -> None:
    simulator = Simulator(
        6,
        fake_run(turns=40),
        seed=seed,
        network=Network(loss=0.05),
        faults=[Fault.start(peer=5, at=9, donor=1)],
        absent=[5],
    )
    assert simulator.run(120, done)
    check_equal(simulator)
    joiner = simulator.peers[5]
    assert joiner.snapshot is not None
    assert not dropped(simulator)
    assert sum(k.author.peer == joiner.id for k in joiner.records) >= 4, "it trained"
    for author, count in joiner.snapshot.counts():
        assert lowest(joiner, next(p for p in simulator.peers if p.id == author.peer)) == count + 1
    assert joiner.core.agrees()
    assert simulator.peers[0].core.agrees()


def test_it_trains_only_once_somebody_else_has_confirmed_the_snapshot() -> None:
    simulator = Simulator(
        4,
        fake_run(turns=30),
        seed=1,
        faults=[
            *(Fault.crash(peer=p, at=8.9) for p in (2, 3)),
            Fault.start(peer=1, at=9, donor=0),
            *(Fault.restart(peer=p, at=11) for p in (2, 3)),
        ],
        absent=[1],
    )
    joiner = simulator.peers[1]
    simulator.run(9.5)
    assert joiner.core.repair.caught_up()
    assert not joiner.core.joined, "others are known, and have not spoken"
    assert simulator.run(120, done)
    assert joiner.core.joined
    check_equal(simulator)


def test_with_nobody_but_the_donor_there_it_trains_at_once() -> None:
    simulator = Simulator(
        2, fake_run(turns=20), seed=2, faults=[Fault.start(peer=1, at=9, donor=0)], absent=[1]
    )
    simulator.run(10.5)
    assert simulator.peers[1].core.joined
    assert simulator.run(120, done)
    check_equal(simulator)


def test_two_who_join_at_once_need_not_wait_for_each_other() -> None:
    """Neither has been confirmed, so neither can confirm."""
    faults = [Fault.start(peer=1, at=9, donor=0), Fault.start(peer=2, at=9, donor=0)]
    simulator = Simulator(3, fake_run(turns=40), seed=2, faults=faults, absent=[1, 2])
    simulator.run(12)
    assert all(peer.core.joined for peer in simulator.peers)
    assert simulator.run(120, done)
    check_equal(simulator)


def test_whose_log_is_full_lacks_what_others_hold_and_disputes_nothing() -> None:
    simulator = Simulator(
        3,
        fake_run(turns=40),
        seed=2,
        faults=[Fault.fill_disk(peer=0, at=5), Fault.start(peer=2, at=12, donor=1)],
        absent=[2],
    )
    simulator.run(200)
    core = simulator.peers[2].core
    assert core.footing.snapshot is not None
    assert core.repair.lacks(simulator.peers[0].id, core.footing.snapshot.lines)
    assert not dropped(simulator)


@pytest.mark.parametrize("lie", ["model", "fingerprint", "hashes", "counts", "author"])
@pytest.mark.parametrize("seed", range(3))
def test_a_lie_is_found_out_and_the_log_fetched_after_all(lie: str, seed: int) -> None:
    simulator = Simulator(
        6,
        fake_run(turns=16),
        seed=seed,
        network=Network(loss=0.05),
        faults=[Fault.start(peer=5, at=9, donor=1, lie=lie)],
        absent=[5],
    )
    assert simulator.run(240, done)
    joiner = simulator.peers[5]
    assert joiner.snapshot is None
    assert len(dropped(simulator)) == 1
    check_equal(simulator)
    assert simulator.expected_fingerprint(joiner) == joiner.core.fingerprint
    assert not any(p.core.diverged for p in simulator.peers)


def test_of_which_turns_the_updates_are_is_not_the_donors_to_say() -> None:
    """Nothing confirms it: whoever believes it would think that the run is over."""
    simulator = Simulator(
        5,
        fake_run(turns=90),
        seed=3,
        faults=[Fault.start(peer=4, at=9, donor=1, lie="turns")],
        absent=[4],
    )
    assert simulator.run(240, done)
    check_equal(simulator)
    joiner = simulator.peers[4]
    own = [k for k in joiner.records if k.author.peer == joiner.id]
    assert len(own) >= 20
    assert not dropped(simulator), "the model is as it should be"


def test_one_who_speaks_first_does_not_decide_alone() -> None:
    """The others confirm an honest snapshot a little later than a liar disputes it."""
    simulator = Simulator(
        5,
        fake_run(turns=60),
        seed=6,
        faults=[Fault.start(peer=4, at=9, donor=0)],
        absent=[4],
    )
    simulator.run(9.3)
    joiner, liar = simulator.peers[4], simulator.peers[2]
    snapshot = joiner.snapshot
    assert snapshot is not None
    joiner.core.footing.dispute(liar.id)
    simulator.run(9.6)
    assert not dropped(simulator)
    assert simulator.run(240, done)
    check_equal(simulator)
    assert joiner.snapshot is snapshot


def test_what_was_known_below_a_dropped_snapshot_is_taken_again() -> None:
    """It came by gossip, too, and was in the sum already: so it was neither kept nor missed."""
    simulator = Simulator(
        4,
        fake_run(turns=60),
        seed=6,
        faults=[Fault.start(peer=3, at=9, donor=0)],
        absent=[3],
    )
    simulator.run(9.5)
    joiner, other = simulator.peers[3], simulator.peers[1]
    snapshot = joiner.core.footing.snapshot
    assert snapshot is not None
    known = [r for key, r in other.records.items() if key.number <= 3]
    simulator._later(0.0, joiner, ev.Received(other.id, Push(tuple(known))))
    simulator._later(0.1, joiner, ev.WorkerReady((), (0, 0)))
    assert simulator.run(120, done)
    assert dropped(simulator) == ["the worker can't use it"]
    check_equal(simulator)


def test_who_has_begun_on_made_up_updates_is_told_by_those_that_lack_them() -> None:
    """With the donor alone it trained at once; the others come later, and never had them."""
    simulator = Simulator(
        5,
        fake_run(turns=40),
        seed=2,
        faults=[
            *(Fault.crash(peer=p, at=8) for p in (0, 1, 2)),
            Fault.start(peer=4, at=20, donor=3, lie="author"),
            *(Fault.restart(peer=p, at=25) for p in (0, 1, 2)),
        ],
        absent=[4],
    )
    simulator.run(24)
    joiner = simulator.peers[4]
    assert simulator.run(400, done)
    assert joiner.snapshot is None
    check_equal(simulator)
    simulator.run(simulator.now + 60)
    assert not any(p.core.lag() or p.core.out_of_reach() for p in simulator.peers)


def test_who_asks_for_a_log_that_is_gone_says_so_and_does_not_train() -> None:
    """It would train from the initial model, and pull the others back there."""
    simulator = Simulator(
        4,
        fake_run(turns=200),
        seed=8,
        faults=[
            Fault.start(peer=1, at=9, donor=0),
            Fault.start(peer=2, at=10, donor=0),
            Fault.crash(peer=0, at=40),
            Fault.start(peer=3, at=50),
        ],
        absent=[1, 2, 3],
    )
    simulator.run(600)
    late = simulator.peers[3]
    lacking = {a: n for p in (1, 2) for a, n in simulator.peers[p].snapshot.counts()}
    assert late.core.state == "joining"
    assert late.core.out_of_reach() > 0
    assert not any(key.author.peer == late.id for key in late.records)
    assert simulator.peers[1].core.out_of_reach() == simulator.peers[2].core.out_of_reach() == 0
    assert late.core.out_of_reach() <= sum(lacking.values())
    assert simulator.peers[1].core.fingerprint == simulator.peers[2].core.fingerprint


def test_a_model_that_is_about_to_go_is_not_told_of() -> None:
    simulator = Simulator(
        3, fake_run(turns=40), seed=1, faults=[Fault.start(peer=2, at=9, donor=1)], absent=[2]
    )
    simulator.run(40)
    core = simulator.peers[2].core
    assert core.steady()
    assert any(link.stated for link in core.repair.links.values())
    told = core._sequence
    core._drop_snapshot("of a test")
    assert not core.steady()
    assert not core.repair.caught_up(), "it catches up anew with whoever speaks next"
    assert not any(link.stated for link in core.repair.links.values())
    assert not core.joined
    assert core.turns.next == 0, "what the turn was is asked again, too"
    # The worker may be busy with a turn for long: nothing is said of the old model meanwhile.
    core.agreement.fingerprint = (1, 2)
    core.agreement._unchecked = dict.fromkeys(core.agreement.statements, 0)
    core._check()
    core._state_progress(simulator.now)
    assert not core.counters.get("disagreement")
    assert core._sequence == told
    simulator.run(60)
    assert core.steady()


def test_a_lie_found_out_after_a_restart_is_dropped_too() -> None:
    simulator = Simulator(
        5,
        fake_run(turns=24),
        seed=7,
        faults=[
            Fault.start(peer=4, at=9, donor=1, lie="model"),
            Fault.crash(peer=4, at=9.4),
            Fault.restart(peer=4, at=12),
        ],
        absent=[4],
    )
    assert simulator.run(240, done)
    assert simulator.peers[4].snapshot is None
    check_equal(simulator)


def test_a_joiner_goes_on_from_its_own_disk_and_gives_snapshots_itself() -> None:
    """In the end nobody is left who has the log from its beginning."""
    simulator = Simulator(
        5,
        fake_run(turns=90),
        seed=3,
        faults=[
            Fault.start(peer=3, at=9, donor=1),
            Fault.crash(peer=3, at=16),
            Fault.restart(peer=3, at=18),
            *(Fault.crash(peer=p, at=60) for p in (0, 1, 2)),
            Fault.start(peer=4, at=64, donor=3),
        ],
        absent=[3, 4],
    )
    assert simulator.run(300, done)
    last, before = simulator.peers[4], simulator.peers[3]
    assert last.snapshot is not None
    assert before.snapshot is not None
    assert last.core.fingerprint == before.core.fingerprint
    assert set(before.pulls.values()) == {1}, "what was on the disk was not fetched again"
    assert sum(count for _, count in last.snapshot.counts()) > sum(
        count for _, count in before.snapshot.counts()
    )


def test_a_joiner_without_one_learns_from_those_that_have_the_log() -> None:
    """One neighbour can't send what it holds as a sum alone: nobody blames it, others are asked."""
    simulator = Simulator(
        5,
        fake_run(turns=24),
        seed=5,
        network=Network(loss=0.05),
        faults=[
            Fault.start(peer=3, at=9, donor=1),
            Fault.start(peer=4, at=16),
        ],
        absent=[3, 4],
    )
    assert simulator.run(240, done)
    check_equal(simulator)
    assert lowest(simulator.peers[4], simulator.peers[0]) == 1
    assert not any(p.core.counters.get("not found") for p in simulator.peers)


def test_a_proof_against_what_a_snapshot_holds_makes_it_fetch_the_log() -> None:
    simulator = Simulator(
        5,
        fake_run(turns=40),
        seed=4,
        faults=[Fault.start(peer=4, at=12, donor=0)],
        absent=[4],
    )
    simulator.run(26)
    joiner, cheat = simulator.peers[4], simulator.peers[2]
    first = next(
        record
        for key, record in simulator.peers[0].records.items()
        if (key.author.peer, key.number) == (cheat.id, 2)
    )
    assert isinstance(first.statement, Update)
    assert joiner.core.frontier.summed(first.statement.author) > 2
    second = fake_seal(replace(first.statement, turn=1))
    smaller, larger = sorted((first, second), key=lambda r: r.id)
    proof = fake_seal(Proof(first.statement.author, 2, smaller.raw, larger.raw))
    told = ev.Received(simulator.peers[1].id, Push((proof,)))
    simulator._push(simulator.now, 0, told, simulator.peers[0].life)
    assert not dropped(simulator)
    others = [p for p in simulator.peers if p is not cheat]
    simulator.run(300, lambda s: len({p.core.fingerprint for p in others}) == 1 and s.now > 90)
    assert dropped(simulator) == ["an update in it does not count"]
    assert {p.core.fingerprint for p in others} == {simulator.expected_fingerprint(joiner)}
    assert joiner.core.frontier.count(first.statement.author) == 1
    assert all(p.core.turns.finished() for p in others)


def test_dropping_comes_before_the_rebuild() -> None:
    simulator = Simulator(
        3,
        fake_run(turns=16),
        seed=1,
        faults=[Fault.start(peer=2, at=9, donor=1)],
        absent=[2],
    )
    simulator.run(9.005)
    core = simulator.peers[2].core
    snapshot = core.footing.snapshot
    assert snapshot is not None
    effects = core.handle(ev.WorkerReady(snapshot.counts(), (1, 2)), simulator.now)
    kinds = [type(e) for e in effects if isinstance(e, ev.DropSnapshot | ev.Rebuild)]
    assert kinds == [ev.DropSnapshot, ev.Rebuild]


def test_dropping_a_snapshot_reads_no_more_of_the_log_than_there_is_room_for() -> None:
    simulator = Simulator(
        3,
        fake_run(turns=70),
        seed=1,
        limits=replace(sim(), unordered=16),
        faults=[Fault.start(peer=2, at=9, donor=1)],
        absent=[2],
    )
    simulator.run(50)
    joiner = simulator.peers[2]
    above = sum(key.author.peer != joiner.id for key in joiner.records)
    assert above > 60
    read: list[Key] = []
    recall = joiner.core._held.recall

    def counted(key: Key) -> Record | None:
        read.append(key)
        return recall(key)

    joiner.core._held = replace(joiner.core._held, recall=counted)
    joiner.core._drop_snapshot("of a test")
    assert len(read) <= 2 * (SURE + 1) < above
    assert simulator.run(400, done)
    check_equal(simulator)


# ---------------------------------------------------------------- what is said about its edge


@pytest.fixture
def edge() -> tuple[Simulator, SimPeer, Entry]:
    """A joiner, and the statement of one log, two updates above where its snapshot ends."""
    simulator = Simulator(
        3, fake_run(turns=40), seed=1, faults=[Fault.start(peer=2, at=9, donor=1)], absent=[2]
    )
    simulator.run(13)
    core = simulator.peers[2].core
    entry = next(e for e in core.frontier.entries() if e.summed and e.count >= e.summed + 2)
    return simulator, simulator.peers[2], entry


def say(simulator: Simulator, joiner: SimPeer, message: Message) -> list[Message]:
    """Let peer 0, a neighbour, say this; return what it is answered."""
    event = ev.Received(simulator.peers[0].id, message)
    effects = joiner.core.handle(event, simulator.now)
    return [e.message for e in effects if isinstance(e, ev.Send)]


def stated(entry: Entry) -> Digest:
    return Digest((entry,), True, digest(b"another frontier"), digest(b"another view"), False)


def test_who_holds_other_updates_where_it_ends_disputes_it(
    edge: tuple[Simulator, SimPeer, Entry],
) -> None:
    simulator, joiner, entry = edge
    other = simulator.peers[0].id
    say(simulator, joiner, stated(replace(entry, count=entry.summed, hash=digest(b"x"))))
    assert joiner.core.footing._disputes == {other}
    joiner.core.footing.present(())
    say(simulator, joiner, Hashes(entry.author, (entry.summed, entry.count), (digest(b"x"),) * 2))
    assert joiner.core.footing._disputes == {other}
    joiner.core.footing.present(())
    hashes = (joiner.core.frontier.logs[entry.author].hash_at(entry.summed), digest(b"x"))
    counts = (entry.summed, entry.summed + 1)
    asked = say(simulator, joiner, Hashes(entry.author, counts, hashes))
    assert Want(entry.author, counts[1], counts[1]) in asked
    assert not joiner.core.footing._disputes, "they part above it"


def test_a_fork_above_it_is_looked_for_at_its_edge_too(
    edge: tuple[Simulator, SimPeer, Entry],
) -> None:
    simulator, joiner, entry = edge
    answers = say(simulator, joiner, stated(replace(entry, hash=digest(b"x"))))
    asked = next(each for each in answers if isinstance(each, AskHashes))
    assert asked.counts[0] == entry.summed
    assert asked.counts[-1] == entry.count
    # Right above its edge, too: there is nothing between to ask for.
    low = replace(entry, count=entry.summed + 1, hash=digest(b"x"))
    answers = say(simulator, joiner, stated(low))
    assert AskHashes(entry.author, (entry.summed, entry.summed + 1)) in answers


def test_what_another_states_below_it_says_nothing(
    edge: tuple[Simulator, SimPeer, Entry],
) -> None:
    simulator, joiner, entry = edge
    below = replace(entry, count=entry.summed - 1, summed=0, hash=digest(b"x"))
    answers = say(simulator, joiner, stated(below))
    assert not any(isinstance(each, AskHashes | Want) for each in answers)
    assert not joiner.core.footing._disputes
    known = Hashes(entry.author, (1, entry.summed - 1), (digest(b"x"),) * 2)
    assert not any(isinstance(e, AskHashes | Want) for e in say(simulator, joiner, known))
    asked = AskHashes(entry.author, (1, entry.summed - 1, entry.summed))
    (told,) = (each for each in say(simulator, joiner, asked) if isinstance(each, Hashes))
    assert told.counts == (entry.summed,)


def test_nobody_is_asked_for_what_it_holds_as_a_sum(
    edge: tuple[Simulator, SimPeer, Entry],
) -> None:
    simulator, joiner, entry = edge
    last = entry.count
    gap = replace(entry, count=last + 9, summed=last + 4, hash=digest(b"x"))
    answers = say(simulator, joiner, stated(gap))
    assert [w for w in answers if isinstance(w, Want)] == [Want(entry.author, last + 5, last + 9)]
    repair, other = joiner.core.repair, simulator.peers[0].id
    assert other not in repair.holders(entry.author, last + 4)
    assert other in repair.holders(entry.author, last + 5)
    assert repair.out_of_reach() == 4
    say(simulator, joiner, stated(replace(gap, summed=last + 9)))
    assert repair.out_of_reach() == 9
    assert joiner.core.repair.lag() == 9


@pytest.mark.parametrize("above", [0, 1])
def test_a_proof_right_above_its_edge_leaves_it_as_it_is(
    edge: tuple[Simulator, SimPeer, Entry], above: int
) -> None:
    simulator, joiner, entry = edge
    number = entry.summed + above
    records = simulator.peers[0].records
    first = next(r for k, r in records.items() if (k.author, k.number) == (entry.author, number))
    assert isinstance(first.statement, Update)
    second = fake_seal(replace(first.statement, turn=1))
    smaller, larger = sorted((first, second), key=lambda r: r.id)
    say(
        simulator,
        joiner,
        Push((fake_seal(Proof(entry.author, number, smaller.raw, larger.raw)),)),
    )
    assert (joiner.core.footing.snapshot is None) is (above == 0)
    assert joiner.core.frontier.closed(entry.author) == number
    assert joiner.core.frontier.count(entry.author) == (number - 1 if above else 0)


def test_a_payload_is_not_pulled_from_who_holds_it_as_a_sum() -> None:
    simulator = Simulator(3, fake_run(turns=40), seed=1)
    simulator.run(9)
    arrivals, author = simulator.peers[0].core.arrivals, Author(simulator.peers[1].id, 99)
    update = Update(author, 3, 1, "fake", digest(b"payload"), 5000, None)
    record, first, second = fake_seal(update), *(simulator.peers[n].id for n in (1, 2))
    arrivals.take(record, update, first, own=False)
    arrivals.holds(second, author, 5, 3)
    assert not arrivals.heard_from[record.id] - {first}
    arrivals.holds(second, author, 5, 2)
    assert arrivals.heard_from[record.id] == {first, second}


def test_who_states_less_than_it_stands_for_speaks_for_it_no_more(
    edge: tuple[Simulator, SimPeer, Entry],
) -> None:
    simulator, joiner, _ = edge
    simulator.run(45)
    core, (one, other) = joiner.core, (simulator.peers[n].id for n in (0, 1))
    said = core.agreement.statements
    core.footing._agree, core.footing._differ = {one, other}, {PeerId(digest(b"somebody"))}
    said[one] = replace(said[one], frontier=said[one].frontier[1:])
    core._review_footing(simulator.now)
    assert core.footing._gone == {one}


def test_while_a_rebuild_is_due_nothing_is_compared_or_told(
    edge: tuple[Simulator, SimPeer, Entry],
) -> None:
    simulator, joiner, _ = edge
    simulator.run(45)
    core, told = joiner.core, joiner.core._sequence
    right = core.agreement.fingerprint
    for due in (True, False):
        core.turns.rebuild = due
        core.agreement.fingerprint = (1, 2)
        core.agreement._unchecked = dict.fromkeys(core.agreement.statements, 0)
        core._check()
        assert bool(core.counters.get("disagreement")) is not due
        core.turns.rebuild, core.agreement.fingerprint = due, right
        core._state_progress(simulator.now)
        assert core._sequence == told + (not due)
