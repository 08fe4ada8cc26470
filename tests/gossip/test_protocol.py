"""Two cores wired by hand: the order of effects, the worker's hand-shake, refutation."""

import random
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.gossip import events as ev
from shoal.gossip.limits import Limits
from shoal.gossip.messages import Ack, AskAdmission, Digest, Ping, Push, Vouch, Want
from shoal.gossip.names import Author, Key, PeerId, RunId, digest
from shoal.gossip.protocol import Protocol
from shoal.gossip.records import (
    Alive,
    Leave,
    Progress,
    Record,
    Report,
    Standing,
    Statement,
    Suspect,
    Update,
)
from shoal.gossip.run import Held, Run

RUN = Run(RunId(digest(b"run")), turns=5, most_bytes={"fake": 1000})
ONE, TWO = PeerId(digest(b"one")), PeerId(digest(b"two"))
NO_MODEL = ev.WorkerReady((), (0, 0))


def seal(statement: Statement) -> Record:
    raw = repr(statement).encode()
    return Record(digest(raw), raw, statement)


def core(me: PeerId = ONE, records: Iterable[Record] = (), run: Run = RUN) -> Protocol:
    by_key = {
        Key(r.statement.author, r.statement.number): r
        for r in records
        if isinstance(r.statement, Update)
    }
    held = Held(tuple(by_key.values()), recall=by_key.get)
    return Protocol(run, me, 7, 1, seal, random.Random(1), Limits(), held)


def started(me: PeerId = ONE, run: Run = RUN) -> Protocol:
    one = core(me, run=run)
    one.handle(ev.Start(("/ip4/127.0.0.1/tcp/1",), b"admitted", alone=True), 0.0)
    return one


def of(kind: type, effects: list[ev.Effect]) -> list[ev.Effect]:
    return [e for e in effects if isinstance(e, kind)]


def worker_requests(effects: list[ev.Effect]) -> list[ev.Effect]:
    return [e for e in effects if isinstance(e, ev.StartTurn | ev.Apply | ev.Subtract | ev.Rebuild)]


def turn_done(turn: int) -> ev.TurnDone:
    payload = b"payload of %d" % turn
    return ev.TurnDone(turn, "fake", digest(payload), len(payload), payload, Report(turn=turn))


def update(author: Author, number: int, payload: bytes = b"x") -> Record:
    body = Update(author, number, number, "fake", digest(payload), len(payload), payload)
    return seal(body)


def pushed(effects: list[ev.Effect], to: PeerId) -> list[Statement]:
    return [
        record.statement
        for e in effects
        if isinstance(e, ev.Send) and e.peer == to and isinstance(e.message, Push)
        for record in e.message.records
    ]


def test_who_begins_alone_uses_no_number_under_a_log_that_others_may_know_more_of() -> None:
    """Its directory may have been put back, and there is nobody who could tell."""
    author = Author(ONE, 7)
    begun = (
        ev.Start(("/ip4/127.0.0.1/tcp/1",), b"admitted", alone=alone) for alone in (True, False)
    )
    for start in begun:
        fresh, back = core(), core(records=[update(author, 1), update(author, 2)])
        for one in (fresh, back):
            one.handle(start, 0.0)
            for second in range(1, 60):
                one.handle(ev.Tick(), float(second))
            assert one.joined
        assert fresh.log == 7
        assert back.log != 7


@pytest.mark.parametrize("standing", [Standing.JOINING, Standing.TRAINING])
def test_a_newcomer_does_not_take_another_ones_word_that_there_is_nothing(
    standing: Standing,
) -> None:
    one, empty = core(), core(TWO).frontier
    one.handle(ev.Start(("a",), b"admitted", alone=False), 0.0)
    one.handle(ev.LinkUp(TWO, b"admitted"), 0.1)
    one.handle(ev.Received(TWO, Push((seal(Alive(TWO, 1, 5, standing)),))), 0.2)
    nothing = Digest(empty.entries(), True, empty.hash, 0, False)
    one.handle(ev.Received(TWO, nothing), 0.3)
    assert one.joined == (standing is Standing.TRAINING)
    for second in range(1, 20):  # in the end they begin all the same
        one.handle(ev.Tick(), float(second))
    assert one.joined


def test_who_holds_updates_believes_a_newcomer_that_holds_none() -> None:
    one = core(records=[update(Author(TWO, 3), 1)])
    nothing = core(TWO).frontier
    one.handle(ev.Start(("a",), b"admitted", alone=False), 0.0)
    one.handle(ev.LinkUp(TWO, b"admitted"), 0.1)
    one.handle(ev.Received(TWO, Push((seal(Alive(TWO, 1, 5, Standing.JOINING)),))), 0.2)
    one.handle(ev.Received(TWO, Digest((), True, nothing.hash, 0, False)), 0.3)
    assert one.joined, "it has no need to wait for more"


def test_what_a_peer_says_after_a_restart_is_heard_however_much_it_said_before() -> None:
    one, two, nothing = started(), started(TWO), core(TWO).frontier
    one.handle(ev.LinkUp(TWO, b"admitted"), 0.1)
    one.handle(ev.Received(TWO, Push((seal(Alive(TWO, 1, 5, Standing.TRAINING)),))), 0.2)
    before = seal(Progress(TWO, 900, (), nothing.hash, (0, 0), Report(turn=50)))
    one.handle(ev.Received(TWO, Push((before,))), 0.3)
    two.handle(ev.LinkUp(ONE, b"admitted"), 1.0)
    two.handle(NO_MODEL, 1.1)
    two.handle(ev.Reported(Report(turn=60)), 1.2)
    sequences = []
    for second in range(2, 60):
        for said in pushed(two.handle(ev.Tick(), float(second)), ONE):
            if isinstance(said, Progress):
                sequences.append(said.sequence)
                for told in pushed(one.handle(ev.Received(TWO, Push((seal(said),))), second), TWO):
                    two.handle(ev.Received(ONE, Push((seal(told),))), second)
    assert sequences[:2] == [1, 901]
    assert one.agreement.statements[TWO].report.turn == 60


def test_models_that_differed_do_not_agree_because_the_other_one_is_gone() -> None:
    one, nothing = started(), core(TWO).frontier
    one.handle(ev.LinkUp(TWO, b"admitted"), 0.1)
    one.handle(ev.Received(TWO, Push((seal(Alive(TWO, 1, 5, Standing.TRAINING)),))), 0.2)
    one.handle(NO_MODEL, 0.3)
    one.handle(ev.Applied((), (0, 0), ()), 0.4)

    def say(sequence: int, value: int) -> list[str]:
        told = Progress(TWO, sequence, (), nothing.hash, (value, value), Report())
        effects = one.handle(ev.Received(TWO, Push((seal(told),))), float(sequence))
        return [e.what for e in effects if isinstance(e, ev.Happened)]

    say(1, 5)
    done = ev.TurnDone(1, "fake", None, 0, None, Report(turn=1))
    assert worker_requests(one.handle(done, 1.5)) == [ev.Rebuild()]
    one.handle(ev.Rebuilt(ev.Applied((), (0, 0), ())), 1.6)
    assert [say(sequence, 5) for sequence in (2, 3, 4)] == [[], [], ["diverged"]]
    one.handle(ev.Received(TWO, Push((seal(Leave(TWO, 2)),))), 5.0)
    assert one.agrees() is None
    effects = one.handle(ev.Rebuilt(ev.Applied((), (0, 0), ())), 6.0)
    assert "agreed" not in [e.what for e in effects if isinstance(e, ev.Happened)]
    assert one.state.startswith("diverged")
    one.handle(ev.Received(TWO, Push((seal(Alive(TWO, 3, 5, Standing.TRAINING)),))), 7.0)
    assert say(8, 0) == ["agreed"]
    assert not one.diverged


def test_a_hole_in_the_own_log_and_a_number_beyond_it_mean_a_fresh_log() -> None:
    author = Author(ONE, 7)
    records = [update(author, n) for n in (1, 2, 3)]
    assert core(records=records).log == 7
    assert core(records=[records[0], records[2]]).log != 7
    for known, fresh in ((records[2], False), (update(author, 4), True)):
        one = core(records=records)
        one.handle(ev.Start(("a",), b"admitted", alone=False), 0.0)
        one.handle(ev.LinkUp(TWO, b"admitted"), 0.1)
        effects = one.handle(ev.Received(TWO, Push((known,))), 0.2)
        assert (one.log != 7) == fresh
        said = [e.what for e in effects if isinstance(e, ev.Happened)]
        assert said == ["new-log"] * fresh


def test_only_who_states_the_same_updates_holds_them() -> None:
    """Settled means settled on the same updates: what differs may not be forgotten."""
    author, third = Author(TWO, 3), PeerId(digest(b"three"))
    records = [update(author, n) for n in (1, 2, 3)]
    one = core(records=records)
    one.handle(ev.Start(("a",), b"admitted", alone=True), 0.0)
    others = {
        TWO: core(TWO, records).frontier,
        third: core(third, [*records[:2], update(author, 3, b"y")]).frontier,
    }
    for peer, frontier in others.items():
        one.handle(ev.LinkUp(peer, b"admitted"), 0.1)
        said = Digest(frontier.entries(), True, frontier.hash, 0, False)
        one.handle(ev.Received(peer, said), 0.2)
    assert one.rows.holds(TWO, author) == 3
    assert one.rows.holds(third, author) == 0


def test_an_update_is_stored_before_anybody_hears_of_it() -> None:
    one = started()
    one.handle(ev.LinkUp(TWO, b"admitted"), 0.1)
    (start,) = worker_requests(one.handle(NO_MODEL, 0.2))
    assert isinstance(start, ev.StartTurn)
    assert (start.turn, start.frontier) == (1, ())
    one.handle(ev.Applied((), (0, 0), ()), 0.3)
    effects = one.handle(turn_done(1), 1.0)
    (store,) = of(ev.Store, effects)
    assert isinstance(store, ev.Store)
    assert store.own
    assert pushed(effects, TWO) == []
    assert worker_requests(effects) == [], "nothing is asked while the number is not on disk"
    effects = one.handle(ev.Stored(store.record), 1.1)
    assert pushed(effects, TWO) == [store.record.statement]
    (following,) = worker_requests(effects)
    assert isinstance(following, ev.StartTurn)
    assert following.turn == 2
    assert dict(following.frontier) == {Author(ONE, 7): 1}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["answer", "update", "down", "ready", "pause", "resume", "tick"])))
def test_the_worker_never_has_two_requests(steps: list[str]) -> None:
    one, author = started(), Author(TWO, 3)
    one.handle(ev.LinkUp(TWO, b"admitted"), 0.0)
    open_request: ev.Effect | None = None
    ready, number, now = False, 0, 0.0
    applied: ev.Applied = ev.Applied((), (0, 0), ())
    queue: list[ev.Event] = []
    for step in [*steps, "answer", "answer"]:
        now += 1.0
        match step:
            case "update":
                number += 1
                queue.append(ev.Received(TWO, Push((update(author, number),))))
            case "down":
                ready, open_request = False, None
                queue.append(ev.WorkerDown("killed"))
            case "ready" if not ready:
                ready, applied = True, ev.Applied((), (0, 0), ())
                queue.append(NO_MODEL)
            case "answer" if open_request is not None:
                request, open_request = open_request, None
                frontier = getattr(request, "frontier", ())
                applied = ev.Applied(frontier, (0, 0), ())
                if isinstance(request, ev.StartTurn):
                    queue += [applied, turn_done(request.turn)]
                else:
                    queue.append(applied)
            case "pause":
                queue.append(ev.Pause())
            case "resume":
                queue.append(ev.Resume())
            case _:
                queue.append(ev.Tick())
        while queue:
            for effect in one.handle(queue.pop(0), now):
                if isinstance(effect, ev.Store):
                    queue.append(ev.Stored(effect.record))
                for request in worker_requests([effect]):
                    assert ready, "nothing is asked of a dead worker"
                    assert open_request is None, f"{request} before {open_request} was answered"
                    open_request = request


def test_a_new_worker_starts_from_the_frontier_it_states() -> None:
    one = started(run=Run(RUN.id, turns=0, most_bytes=RUN.most_bytes, observe=True))
    author = Author(TWO, 3)
    one.handle(ev.LinkUp(TWO, b"admitted"), 0.0)
    for n in (1, 2):
        (store,) = of(ev.Store, one.handle(ev.Received(TWO, Push((update(author, n),))), 0.1))
        assert isinstance(store, ev.Store)
        one.handle(ev.Stored(store.record), 0.1)
    (apply,) = worker_requests(one.handle(NO_MODEL, 1.0))
    assert apply == ev.Apply(((author, 2),))
    one.handle(ev.WorkerDown("killed"), 2.0)
    (again,) = worker_requests(one.handle(ev.WorkerReady(((author, 1),), (5, 5)), 3.0))
    assert again == ev.Apply(((author, 2),))
    ahead = one.handle(ev.WorkerDown("killed"), 4.0)
    ahead = one.handle(ev.WorkerReady(((author, 9),), (5, 5)), 5.0)
    assert worker_requests(ahead) == [ev.Rebuild()], "it holds more than the log"


def test_a_dropped_turn_publishes_nothing_and_the_next_one_starts() -> None:
    one = started()
    one.handle(NO_MODEL, 0.1)
    one.handle(ev.Applied((), (0, 0), ()), 0.2)
    effects = one.handle(ev.TurnDone(1, "fake", None, 0, None, Report(turn=1)), 1.0)
    assert of(ev.Store, effects) == []
    (start,) = worker_requests(effects)
    assert isinstance(start, ev.StartTurn)
    assert start.turn == 2


def test_the_answer_of_another_turn_is_none() -> None:
    """A worker that was asked anew may still tell of what the one before it did."""
    one = started()
    one.handle(NO_MODEL, 0.1)
    one.handle(ev.Applied((), (0, 0), ()), 0.2)
    effects = one.handle(turn_done(2), 1.0)
    assert of(ev.Store, effects) == []
    assert worker_requests(effects) == []
    (store,) = of(ev.Store, one.handle(turn_done(1), 2.0))
    assert isinstance(store, ev.Store)
    assert isinstance(store.record.statement, Update)
    assert store.record.statement.turn == 1


def test_a_full_log_discards_the_turn() -> None:
    one = started()
    one.handle(NO_MODEL, 0.1)
    one.handle(ev.Applied((), (0, 0), ()), 0.2)
    (store,) = of(ev.Store, one.handle(turn_done(1), 1.0))
    assert isinstance(store, ev.Store)
    effects = one.handle(ev.StoreFailed(store.record, "log full"), 1.1)
    assert of(ev.Discard, effects) == [ev.Discard()]
    assert of(ev.Store, effects) == []
    assert worker_requests(effects) == []
    assert one.state == "degraded: log full"


def with_a_full_log() -> Protocol:
    """Return a peer whose log had no room for an update of another."""
    one = started()
    one.handle(ev.LinkUp(TWO, b"admitted"), 0.0)
    one.handle(NO_MODEL, 0.1)
    one.handle(ev.Applied((), (0, 0), ()), 0.2)
    (store,) = of(ev.Store, one.handle(ev.Received(TWO, Push((update(Author(TWO, 3), 1),))), 0.5))
    assert isinstance(store, ev.Store)
    one.handle(ev.StoreFailed(store.record, "log full"), 0.6)
    return one


def test_a_log_full_of_others_updates_stops_publishing_too() -> None:
    one = with_a_full_log()
    effects = one.handle(turn_done(1), 1.0)
    assert of(ev.Store, effects) == []
    assert of(ev.Discard, effects) == [ev.Discard()]
    assert one.state == "degraded: log full"


def test_a_log_that_has_room_again_is_published_to_again() -> None:
    one = with_a_full_log()
    assert worker_requests(one.handle(turn_done(1), 1.0)) == []
    (again,) = worker_requests(one.handle(ev.StoreMended(), 2.0))
    assert isinstance(again, ev.StartTurn)
    assert one.state == "training"
    assert of(ev.Store, one.handle(ev.Received(TWO, Push((update(Author(TWO, 3), 1),))), 3.0))


def test_after_a_disk_error_the_update_is_numbered_in_a_fresh_log() -> None:
    one = started()
    one.handle(NO_MODEL, 0.1)
    one.handle(ev.Applied((), (0, 0), ()), 0.2)
    (store,) = of(ev.Store, one.handle(turn_done(1), 1.0))
    assert isinstance(store, ev.Store)
    (again,) = of(ev.Store, one.handle(ev.StoreFailed(store.record, "disk: EIO"), 1.1))
    assert isinstance(again, ev.Store)
    first, second = store.record.statement, again.record.statement
    assert isinstance(first, Update)
    assert isinstance(second, Update)
    assert second.author == Author(ONE, one.log)
    assert (second.author.log != first.author.log, second.number) == (True, 1)
    assert second.payload == first.payload
    one.handle(ev.Stored(again.record), 1.2)
    assert one.state == "degraded: disk"
    assert one.frontier.counts() == ((second.author, 1),)
    one.handle(ev.StoreMended(), 1.3)
    assert one.state == "training"
    assert Author(ONE, one.log) == second.author, "and on in the same log"


def test_a_record_of_a_stranger_waits_until_we_know_how_it_was_admitted() -> None:
    one, stranger = started(), PeerId(digest(b"stranger"))
    one.handle(ev.LinkUp(TWO, b"admitted"), 0.1)
    record = update(Author(stranger, 3), 1)
    effects = one.handle(ev.Received(TWO, Push((record,))), 1.0)
    assert of(ev.Store, effects) == []
    assert ev.Send(TWO, AskAdmission((stranger,))) in effects
    effects = one.handle(ev.Received(TWO, Vouch(stranger, b"admitted")), 2.0)
    assert [e.record for e in effects if isinstance(e, ev.Store)] == [record]


def test_a_failed_pull_goes_to_another_source_and_later_to_whoever_holds_it() -> None:
    one, three, author = started(), PeerId(digest(b"three")), Author(TWO, 3)
    body = Update(author, 1, 1, "fake", digest(b"large"), 900)
    for peer in (TWO, three):
        one.handle(ev.LinkUp(peer, b"admitted"), 0.1)
    record = seal(body)
    effects = one.handle(ev.Received(TWO, Push((record,))), 1.0)
    assert of(ev.Pull, effects) == [ev.Pull(TWO, body.payload, 900)]
    assert of(ev.Pull, one.handle(ev.Received(three, Push((record,))), 1.1)) == []
    effects = one.handle(ev.PullFailed(TWO, body.payload, "gone"), 1.2)
    assert of(ev.Pull, effects) == [ev.Pull(three, body.payload, 900)]
    assert of(ev.Pull, one.handle(ev.PullFailed(three, body.payload, "gone"), 1.3)) == []
    holder = core(TWO, [record])
    digest_of = Digest(holder.frontier.entries(), True, holder.frontier.hash, 0, False)
    asked = of(ev.Pull, one.handle(ev.Received(TWO, digest_of), 1.4))
    one.handle(ev.PullFailed(TWO, body.payload, "gone"), 1.5)
    asked += of(ev.Pull, one.handle(ev.Tick(), 9.0))
    assert asked == [ev.Pull(TWO, body.payload, 900)] * 2


def test_a_suspicion_is_outbid_at_whatever_incarnation() -> None:
    one = started()
    one.handle(ev.LinkUp(TWO, b"admitted"), 0.1)
    for incarnation in (one.membership.incarnation, 40):
        accusation = seal(Suspect(TWO, ONE, incarnation))
        effects = one.handle(ev.Received(TWO, Push((accusation,))), 1.0)
        said = [s for s in pushed(effects, TWO) if isinstance(s, Alive)]
        effects += one.handle(ev.Tick(), 2.0)
        said += [s for s in pushed(effects, TWO) if isinstance(s, Alive)]
        assert said[-1].incarnation == incarnation + 1
        assert said[-1].standing is Standing.TRAINING


def test_a_ping_is_acknowledged_and_a_doubt_in_it_refuted() -> None:
    one = started()
    effects = one.handle(ev.Received(TWO, Ping(5, suspected=3)), 1.0)
    assert ev.Send(TWO, Ack(5)) in effects
    assert any(isinstance(s, Alive) and s.incarnation == 4 for s in pushed(effects, TWO))


def test_equal_frontiers_cost_two_hashes() -> None:
    records = [update(Author(TWO, 3), n) for n in range(1, 50)]
    one, two = core(ONE, records), core(TWO, records)
    for peer in (one, two):
        peer.handle(ev.Start(("a",), b"admitted", alone=True), 0.0)
    said = [e for e in one.handle(ev.LinkUp(TWO, b"admitted"), 1.0) if isinstance(e, ev.Send)]
    two.handle(ev.LinkUp(ONE, b"admitted"), 1.0)
    (statement,) = [e.message for e in said if isinstance(e.message, Digest)]
    assert statement.entries == ()
    answers = two.handle(ev.Received(ONE, statement), 1.1)
    assert not any(isinstance(e, ev.Send) and isinstance(e.message, Digest) for e in answers)


def test_a_hole_is_asked_for_by_its_numbers() -> None:
    author = Author(TWO, 3)
    records = [update(author, n) for n in range(1, 11)]
    full = core(TWO, records)
    full.handle(ev.Start(("a",), b"admitted", alone=True), 0.0)
    one = core(ONE, [records[0], records[1], records[5]])
    one.handle(ev.Start(("a",), b"admitted", alone=True), 0.0)
    one.handle(ev.LinkUp(TWO, b"admitted"), 1.0)
    entries = full.frontier.entries()
    effects = one.handle(ev.Received(TWO, Digest(entries, True, full.frontier.hash, 0, False)), 1.1)
    wants = [e.message for e in effects if isinstance(e, ev.Send) and isinstance(e.message, Want)]
    assert wants == [Want(author, 3, 5), Want(author, 7, 10)]
    full.handle(ev.LinkUp(ONE, b"admitted"), 1.2)
    for want in wants:
        for answer in full.handle(ev.Received(ONE, want), 1.3):
            if isinstance(answer, ev.Send) and isinstance(answer.message, Push):
                for effect in one.handle(ev.Received(TWO, answer.message), 1.4):
                    if isinstance(effect, ev.Store):
                        one.handle(ev.Stored(effect.record), 1.5)
    assert one.frontier.hash == full.frontier.hash


def test_events_that_no_longer_fit_yield_nothing() -> None:
    one = started()
    record = update(Author(TWO, 3), 1)
    stale: list[ev.Event] = [
        ev.LinkDown(TWO, "gone"),
        ev.Pulled(digest(b"unknown")),
        ev.PullFailed(TWO, digest(b"unknown"), "gone"),
        ev.Stored(record),
        ev.StoreFailed(record, "disk: gone"),
        turn_done(3),
        ev.Received(TWO, Ack(99)),
    ]
    for event in stale:
        kinds = {type(e) for e in one.handle(event, 1.0)}
        assert kinds <= {ev.Wake, ev.Store}
    assert one.frontier.total() == 0
