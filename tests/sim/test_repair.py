"""What was missed is got in the end: long logs, lost questions, forks, long absences."""

import random
from dataclasses import replace

import pytest

from shoal.gossip import events as ev
from shoal.gossip.limits import Limits
from shoal.gossip.messages import Message, Push, Want
from shoal.gossip.names import Author, digest
from shoal.gossip.records import Record, Update
from shoal.node.simulation.faults import Fault
from shoal.node.simulation.peers import SimPeer, fake_peer, fake_seal
from shoal.node.simulation.simulator import Simulator
from shoal.node.simulation.workers import FakeWorker, SimWorker, fake_run

pytestmark = pytest.mark.sim


def quick(simulator: Simulator, index: int) -> SimWorker:
    """Many turns in little time."""
    rng = random.Random(f"{simulator.seed}/{index}/{simulator.now}")
    return FakeWorker(simulator.run_, rng, seconds=(0.01, 0.02), sizes=(20, 60))


def test_a_joiner_gets_a_long_log_of_an_author_that_says_nothing_new() -> None:
    """One answer holds 256 records; the line of a finished author never changes again."""
    simulator = Simulator(
        2,
        fake_run(turns=1500),
        seed=1,
        absent=[1],
        faults=[Fault.start(peer=1, at=60)],
        workers=quick,
    )
    simulator.run(60)
    assert simulator.peers[0].core.frontier.total() == 1500
    simulator.run(75)
    late = simulator.peers[1].core
    assert late.frontier.total() >= 1500
    assert late.lag() == 0


def test_a_lost_question_is_asked_again_on_the_same_link() -> None:
    class Deaf(Simulator):
        """The first five seconds of a link swallow every `Want`."""

        def _send(self, sender: SimPeer, to: int, message: Message) -> None:
            if isinstance(message, Want) and self.now < 15:
                return
            super()._send(sender, to, message)

    simulator = Deaf(
        2,
        fake_run(turns=3),
        seed=2,
        absent=[1],
        observers=[1],
        faults=[Fault.start(peer=1, at=10)],
    )
    simulator.run(14)
    assert simulator.peers[1].core.frontier.total() == 0
    simulator.run(40)
    assert simulator.peers[1].core.frontier.total() == 3


def test_a_fork_below_a_known_proof_is_found_too() -> None:
    """Branches part at 3, but what is pushed to both sides first is another number 30."""
    simulator = Simulator(4, fake_run(turns=1), seed=5, observers=range(4))
    simulator.run(5)
    ghost = Author(fake_peer(99, 5), 7)

    def branch(name: int, number: int) -> Record:
        payload = b"%d of %d" % (number, name if number >= 3 else 0)
        simulator.payloads[digest(payload)] = payload
        update = Update(ghost, number, number, "fake", digest(payload), len(payload), payload)
        return fake_seal(update)

    for peer in simulator.peers:
        peer.core.admissions.peers[ghost.peer] = b"admitted"
    simulator._cuts.append(frozenset({0, 1}))
    for index, name in ((0, 1), (2, 2)):
        for number in range(1, 41):
            push = Push((branch(name, number),))
            sender = simulator.peers[3 - index].id
            simulator._later(0.1, simulator.peers[index], ev.Received(sender, push))
    simulator.run(8)
    for index, name in ((0, 2), (2, 1)):
        push = Push((branch(name, 30),))
        sender = simulator.peers[3 - index].id
        simulator._later(0.1, simulator.peers[index], ev.Received(sender, push))
    simulator.run(9)
    assert [p.core.frontier.closed(ghost) for p in simulator.peers] == [30] * 4
    simulator._cuts.clear()
    simulator.run(40)
    assert [p.core.frontier.closed(ghost) for p in simulator.peers] == [3] * 4
    assert len({p.core.frontier.hash for p in simulator.peers}) == 1


SHORT = replace(Limits(), keep=30.0)


@pytest.mark.parametrize("stopped", ["crash", "freeze"])
def test_who_was_forgotten_is_welcome_again(stopped: str) -> None:
    """Its incarnation and its contact are those that were forgotten."""
    gone = [Fault.crash(peer=2, at=5), Fault.restart(peer=2, at=120)]
    if stopped == "freeze":
        gone = [*Fault.freeze(peer=2, at=5, to=120)]
    simulator = Simulator(5, fake_run(), seed=3, limits=SHORT, observers=range(5), faults=gone)
    simulator.run(119)
    back = simulator.peers[2]
    others = [p for p in simulator.peers if p is not back]
    assert all(back.id not in p.core.view.peers() for p in others)
    simulator.run(180)
    for peer in others:
        assert peer.core.view.lives(back.id)
        assert back.id in peer.core.view.contacts
    assert len(back.core.view.ring) == 5


def test_halves_that_forgot_each_other_unite() -> None:
    simulator = Simulator(
        6,
        fake_run(),
        seed=4,
        limits=SHORT,
        observers=range(6),
        faults=[Fault.partition(range(3), at=5, to=120)],
    )
    simulator.run(121)
    assert all(len(p.core.view.peers()) == 3 for p in simulator.peers)
    # Discovery remembers addresses.
    simulator._connect(simulator.peers[0], ev.Connect(simulator.peers[5].id, ()))
    simulator.run(200)
    for peer in simulator.peers:
        assert len(peer.core.view.ring) == 6
        assert len(peer.core.view.contacts) == 6


def test_many_newcomers_at_once_do_not_begin_a_run_anew() -> None:
    """They are more than the members, and none of them has a turn to state."""

    class OneDoor(Simulator):
        """All join by the founder's address."""

        def _bootstrap(self, peer: SimPeer) -> None:
            if peer.index:
                self._connect(peer, ev.Connect(self.peers[0].id, ()))

    late = range(4, 10)
    simulator = OneDoor(
        10,
        fake_run(turns=0),
        seed=6,
        absent=late,
        faults=[Fault.start(peer=i, at=25) for i in late],
    )
    simulator.run(35)
    for index in late:
        peer = simulator.peers[index]
        own = [r.statement for k, r in peer.records.items() if k.author.peer == peer.id]
        assert min(u.turn for u in own if isinstance(u, Update)) > 15


def test_who_left_may_come_back_at_once_and_after_long() -> None:
    for pause in (4.0, 120.0):
        simulator = Simulator(
            4,
            fake_run(),
            seed=7,
            limits=SHORT,
            observers=range(4),
            faults=[
                Fault.depart(peer=2, at=5),
                Fault.crash(peer=2, at=5.5),
                Fault.restart(peer=2, at=5.5 + pause),
            ],
        )
        simulator.run(5 + pause)
        assert all(not p.core.view.lives(simulator.peers[2].id) for p in simulator.living())
        simulator.run(25 + pause)
        for peer in simulator.peers:
            assert len(peer.core.view.ring) == 4
            assert len(peer.core.view.contacts) == 4
