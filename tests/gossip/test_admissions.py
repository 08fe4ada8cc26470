"""How peers were admitted: known, kept, forgotten."""

from dataclasses import replace

from shoal.gossip.admissions import Admissions
from shoal.gossip.events import KeepAdmission
from shoal.gossip.limits import Limits
from shoal.gossip.names import PeerId, digest
from shoal.gossip.outbox import Outbox
from shoal.gossip.view import View


def peer(i: int) -> PeerId:
    return PeerId(digest(b"%d" % i))


def test_many_who_come_and_go_are_forgotten_and_who_has_published_is_not() -> None:
    out = Outbox(64)
    admissions = Admissions(peer(0), {}, replace(Limits(), members=8), out, View())
    admissions.admit(peer(1), b"published")
    admissions.keep(peer(1))
    assert out.drain() == [KeepAdmission(peer(1), b"published")]
    for i in range(2, 200):
        assert admissions.admit(peer(i), b"new") == []
        assert len(admissions.peers) <= 1 + 2 * 8
    assert admissions.of(peer(1)) == b"published"
    assert not admissions.known(peer(2))
    assert admissions.known(peer(199))
