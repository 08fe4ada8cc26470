"""Two updates of one author under one number: proven, taken out of the sum, its author shunned."""

from collections.abc import Callable

from shoal.gossip.arrivals import Arrivals
from shoal.gossip.dissemination import Dissemination
from shoal.gossip.events import Store
from shoal.gossip.frontier import Frontier
from shoal.gossip.limits import Limits
from shoal.gossip.names import Key, PeerId
from shoal.gossip.neighbours import Neighbours
from shoal.gossip.outbox import Outbox
from shoal.gossip.records import Proof, Record, Statement, Update
from shoal.gossip.timers import Timers
from shoal.gossip.view import View

LAST_WORD = 1.0
"""Seconds in which an accused peer may read the proof before its link is closed."""


class Equivocation:
    """Make proofs, take in those of others, act on them."""

    def __init__(
        self,
        me: PeerId,
        limits: Limits,
        timers: Timers,
        out: Outbox,
        frontier: Frontier,
        view: View,
        arrivals: Arrivals,
        dissemination: Dissemination,
        neighbours: Neighbours,
        seal: Callable[[Statement], Record],
        recall: Callable[[Key], Record | None],
        summed: Callable[[], None],
    ) -> None:
        """Prepare; `summed` is called when a snapshot holds an update that no longer counts."""
        self.me, self.limits, self.timers, self.out = me, limits, timers, out
        self.frontier, self.view, self.arrivals = frontier, view, arrivals
        self.dissemination, self.neighbours = dissemination, neighbours
        self._seal, self._recall, self._summed = seal, recall, summed
        self.accused: set[PeerId] = set()
        """Peers other than us of whom a proof is known."""

    def exposed(self) -> bool:
        """Say whether our own key is known to have equivocated: nobody takes from it any more."""
        return any(author.peer == self.me for author in self.view.proofs)

    def accuse(self, second: Record, update: Update, first: Record | None, now: float) -> None:
        """Prove that `second`, a genuine record of `update`, is not the only one of its number."""
        first = first or self._recall(Key(update.author, update.number))
        if first is None or first.id == second.id:
            return
        smaller, larger = sorted((first, second), key=lambda r: r.id)
        proof = Proof(update.author, update.number, smaller.raw, larger.raw)
        self.take(self._seal(proof), proof, None, now)

    def take(self, record: Record, proof: Proof, sender: PeerId | None, now: float) -> bool:
        """Take in a proof that holds; say whether it was news."""
        self.dissemination.see(record.id)
        known = proof.author in self.frontier.logs
        if not known and len(self.frontier.logs) >= self.limits.logs:
            self.out.count("proof-refused")
            return False
        if not self.note(record, proof):
            return False
        self.out.add(Store(record))
        self.out.count("equivocation")
        self.out.happened("equivocation", proof.author.peer, number=proof.number)
        self.arrivals.close(proof.author, proof.number)
        self.dissemination.forward(record, sender, set())
        self.shun(proof.author.peer, now)
        return True

    def note(self, record: Record, proof: Proof) -> bool:
        """Let the smallest number stand; say whether this proof is it."""
        if proof.number <= self.frontier.summed(proof.author):
            # What it takes out of the sum is known to us as a part of the snapshot only.
            self._summed()
        held = self.view.proofs.get(proof.author)
        if held is not None and isinstance(other := held.statement, Proof):  # noqa: SIM102
            if (proof.number, record.id) >= (other.number, held.id):
                return False
        self.view.put(record)
        self.frontier.close(proof.author, proof.number)
        if proof.author.peer != self.me:
            self.accused.add(proof.author.peer)
        return True

    def shun(self, peer: PeerId, now: float) -> None:
        """Let the accused read the proof, then close the link: its owner may know of no theft."""
        if peer not in self.neighbours.links or peer == self.me:
            return
        for record in self.view.proofs.values():
            if isinstance(proof := record.statement, Proof) and proof.author.peer == peer:
                self.out.push(peer, record)
        self.timers.set("shun", now + LAST_WORD, peer)
