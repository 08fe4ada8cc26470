"""How the peers that we know were admitted; what waits until we know it of the others."""

from collections.abc import Mapping

from shoal.gossip.events import KeepAdmission
from shoal.gossip.limits import Limits
from shoal.gossip.messages import AskAdmission, Vouch
from shoal.gossip.names import PeerId
from shoal.gossip.outbox import Outbox
from shoal.gossip.records import Contact, Record
from shoal.gossip.strangers import Strangers
from shoal.gossip.view import View


class Admissions:
    """Admissions by peer. Records of strangers wait for theirs."""

    def __init__(
        self, me: PeerId, held: Mapping[PeerId, bytes], limits: Limits, out: Outbox, view: View
    ) -> None:
        self.me, self.limits, self.out, self.view = me, limits, out, view
        self.peers: dict[PeerId, bytes] = dict(held)
        self.kept: set[PeerId] = set(held)
        """Who has published: their admissions are in the store, and stay."""
        self.strangers = Strangers(limits)

    def known(self, peer: PeerId) -> bool:
        """Say whether we know how `peer` was admitted."""
        return peer in self.view.contacts or peer in self.peers or peer == self.me

    def of(self, peer: PeerId) -> bytes | None:
        """Return how `peer` was admitted, if we know."""
        contact = self.view.contacts.get(peer)
        if contact is not None and isinstance(contact.statement, Contact):
            return contact.statement.admission
        return self.peers.get(peer)

    def admit(self, peer: PeerId, admission: bytes) -> list[tuple[PeerId, Record]]:
        """Note how `peer` was admitted; return the records that waited for it, with who sent them.

        The caller has checked the admission.
        """
        self.peers[peer] = admission
        if len(self.peers) > len(self.kept) + 2 * self.limits.members:
            # Who has published nothing can be asked about again.
            del self.peers[next(p for p in self.peers if p not in self.kept)]
        return self.strangers.take(peer)

    def keep(self, peer: PeerId) -> None:
        """Let the store have the admission of a peer that has published."""
        if peer not in self.kept and (admission := self.of(peer)) is not None:
            self.kept.add(peer)
            self.peers[peer] = admission
            self.out.add(KeepAdmission(peer, admission))

    def hold(self, subject: PeerId, sender: PeerId, record: Record, now: float) -> None:
        """Keep a record of a peer we never met until we know how it was admitted."""
        if not self.strangers.hold(subject, sender, record):
            self.out.count("stranger-dropped")
        elif self.strangers.ask(subject, now):
            self.out.send(sender, AskAdmission((subject,)))

    def vouch(self, asker: PeerId, peers: tuple[PeerId, ...]) -> None:
        """Tell how these were admitted, as far as we know."""
        for peer in peers[: self.limits.push_records]:
            if (admission := self.of(peer)) is not None:
                self.out.send(asker, Vouch(peer, admission))
