"""The daemon's side of the worker: start it, ask it, notice its death, start it again, stop it.

    supervisor = Supervisor(command(threads), log=home.path / "worker.log")
    await supervisor.start()              # again after every WorkerDied: waits longer each time
    opened = await supervisor.ask(pipe.Open(...), pipe.Opened)
    turned, payload = await supervisor.ask_body(pipe.Turn(...), pipe.Turned)
    reason = await supervisor.dead()      # ends when the process has; for whoever has not asked
    await supervisor.stop()

Every call may be cancelled: an answer that nobody waits for any more is dropped when it comes.
"""

import asyncio
import contextlib
import errno
import logging
import os
import signal
import socket
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from shoal.node import pipe
from shoal.node.errors import ConfigError
from shoal.node.pipe import PipeError

log = logging.getLogger(__name__)

TRIES = 5
"""Starts in a row without a good turn, then the worker stays down."""
BACKOFF = 0.5
"""Seconds before the second start; doubles with each further one, up to `BACKOFF_MAX`."""
BACKOFF_MAX = 30.0
GOOD_AGE = 600.0
"""A worker that lived for so many seconds was a good one, whatever ended it."""
GRACE = 20.0
"""Seconds that a worker has to write its checkpoint when it is stopped."""
LAST_WORDS = 2.0
"""Seconds that a process whose pipe has closed has to end before it is killed."""
LOG_BYTES = 1 << 20
"""worker.log is rotated beyond this; one older file is kept."""
_LINE = 2000
_EXHAUSTED = (errno.ENOMEM, errno.EAGAIN, errno.EMFILE, errno.ENFILE)
"""The machine has no memory, process or descriptor to give just now: as if it had died at once."""
_Answer = TypeVar("_Answer", bound=pipe.Answer)


class WorkerDied(Exception):  # noqa: N818 - an event, the core's word is WorkerDown
    """The worker is gone; `reason` is for `/status`. `start` may be called again."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class WorkerGone(WorkerDied):
    """It died too often: it stays down until the operator acts."""


class WorkerRefused(ConfigError):  # noqa: N818 - see WorkerDied
    """The worker says that the operator must act: the run can't be trained as it is asked."""


def command() -> list[str]:
    """Return the command line of the real worker, before the descriptor and the parent's id."""
    return [sys.executable, "-m", "shoal.node.worker"]


def environment(threads: int) -> dict[str, str]:
    """Return the worker's environment: ours, with the maths libraries kept to `threads`."""
    env = dict(os.environ)
    # Threads that spin while they wait starve whoever shares the cores. Measured, two workers of
    # two threads on two cores: 60 s with libgomp's default, 14 s with this; alone 10.7 and 10.5 s.
    env.setdefault("GOMP_SPINCOUNT", "3000")
    if threads:
        for name in ("OMP", "MKL", "OPENBLAS", "NUMEXPR"):
            env[f"{name}_NUM_THREADS"] = str(threads)
    return env


@dataclass(slots=True)
class _Question:
    """A request on its way, and where its answer goes."""

    frame: Sequence[pipe.Buffer]
    answer: "asyncio.Future[tuple[pipe.Answer, bytearray]]"


@dataclass(slots=True)
class _Child:
    """One process, the daemon's end of its pipe, and what it said last."""

    process: asyncio.subprocess.Process
    link: pipe.Async
    born: float
    questions: "asyncio.Queue[_Question | None]" = field(default_factory=asyncio.Queue)
    words: deque[str] = field(default_factory=lambda: deque(maxlen=20))
    """Its last lines on stderr."""
    reason: str = ""
    """Why it died; set before `life` ends."""
    refused: bool = False
    life: "asyncio.Task[None] | None" = None


class Supervisor:
    """Keeps one worker process. All calls from one event loop."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        log: Path | None = None,
        tries: int = TRIES,
        backoff: float = BACKOFF,
    ) -> None:
        self.starts = 0
        """How often a process was started."""
        self.reason = ""
        """Why the last process died; empty while all is well."""
        self._command = command
        self._env = env
        self._log = log
        self._tries = tries
        self._backoff = backoff
        self._failures = 0
        self._child: _Child | None = None

    @property
    def pid(self) -> int | None:
        """Return the process id of the living worker."""
        return self._child.process.pid if self._child is not None else None

    @property
    def restarts(self) -> int:
        """Return how often the worker was started again."""
        return max(0, self.starts - 1)

    async def start(self) -> None:
        """Start the worker if none lives; after deaths wait first, ever longer.

        Raises WorkerGone after too many deaths in a row without a good turn.
        """
        if self._child is not None:
            return
        if self._failures >= self._tries:
            raise WorkerGone(f"{self.reason}; gave up after {self._tries} starts without a turn")
        if self._failures:
            await asyncio.sleep(min(self._backoff * 2 ** (self._failures - 1), BACKOFF_MAX))
        ours, theirs = socket.socketpair()
        try:
            process = await asyncio.create_subprocess_exec(
                *self._command,
                str(theirs.fileno()),
                str(os.getpid()),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                pass_fds=(theirs.fileno(),),
                env=self._env,
                start_new_session=True,  # Ctrl-C is for the daemon, which then stops the worker
            )
        except OSError as error:
            ours.close()
            if error.errno not in _EXHAUSTED:
                raise
            self._failures += 1
            self.reason = f"worker: can't be started ({error.strerror})"
            raise WorkerDied(self.reason) from error
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        loop = asyncio.get_running_loop()
        child = _Child(process, pipe.Async(ours), loop.time())
        child.life = asyncio.create_task(self._live(child), name="worker")
        self._child = child
        self.starts += 1
        log.info("worker started", extra={"pid": process.pid, "restarts": self.restarts})

    async def ask(
        self, request: pipe.Request, expect: type[_Answer], *rest: pipe.Buffer
    ) -> _Answer:
        """Ask for what has no body in its answer; see `ask_body`."""
        return (await self.ask_body(request, expect, rest))[0]

    async def ask_body(
        self,
        request: pipe.Request,
        expect: type[_Answer] | tuple[type[_Answer], ...],
        bodies: Sequence[pipe.Buffer] = (),
    ) -> tuple[_Answer, bytes]:
        """Send a request with its payloads; return answer and body.

        Raises WorkerDied when there is no worker or it dies first, WorkerRefused when it says that
        trying again is no use.
        """
        child = self._child
        if child is None:
            raise WorkerDied(self.reason or "worker: not started")
        frame = pipe.encode(request, bodies)
        question = _Question(frame, asyncio.get_running_loop().create_future())
        child.questions.put_nowait(question)
        answer, body = await question.answer
        if not isinstance(answer, expect):
            reason = f"worker: answered {type(answer).__name__} to {type(request).__name__}"
            await self.kill(reason)
            raise WorkerDied(reason)
        if isinstance(answer, pipe.Turned) and answer.dropped is None:
            self._failures = 0
        return answer, bytes(body)

    async def dead(self) -> str:
        """Wait until the worker that lives now is dead; return why. At once when there is none."""
        child = self._child
        if child is not None and child.life is not None:
            await asyncio.shield(child.life)
            return child.reason
        return self.reason

    async def kill(self, reason: str) -> None:
        """Kill the worker, because of what only the caller knows."""
        child = self._child
        if child is not None and child.life is not None:
            child.reason = reason
            _kill(child.process.pid)
            await asyncio.shield(child.life)

    async def stop(self, grace: float = GRACE, *, save: bool = True) -> None:
        """Let the worker save and end; kill it after `grace` seconds. Cancelled, it kills at once.

        A turn that is running is waited for, within the grace. `save`: see `pipe.Stop`.
        """
        child = self._child
        if child is None or child.life is None:
            return
        child.reason = "stopped"
        try:
            async with asyncio.timeout(grace):
                with contextlib.suppress(WorkerDied, WorkerRefused):
                    await self.ask(pipe.Stop(save), pipe.Ready)
                await asyncio.shield(child.life)
        except TimeoutError:
            log.warning("worker killed: it did not end in time", extra={"seconds": grace})
        finally:
            if self._child is child:
                _kill(child.process.pid)
        await asyncio.shield(child.life)
        self.reason = ""
        self._failures = 0

    # ------------------------------------------------------------------ one process

    async def _live(self, child: _Child) -> None:
        """Carry questions and answers until the process has ended, then tell all who wait."""
        reader = asyncio.create_task(self._read_words(child), name="worker.log")
        asked: _Question | None = None
        failed: pipe.Failed | None = None
        talk = asyncio.create_task(self._talk(child), name="worker pipe")
        end = asyncio.create_task(child.process.wait(), name="worker end")
        try:
            await asyncio.wait({talk, end}, return_when=asyncio.FIRST_COMPLETED)
            if not talk.done():  # what it said before it ended is still in the pipe
                child.questions.put_nowait(None)
                await asyncio.wait({talk}, timeout=LAST_WORDS)
            if not end.done() and not child.reason:
                await asyncio.wait({end}, timeout=LAST_WORDS)
        finally:
            hung = not end.done()
            _kill(child.process.pid)
            talk.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                asked, failed = await talk
            if hung and failed is None:
                child.reason = child.reason or "worker: closed its pipe and did not end; killed"
            code = await end
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LAST_WORDS):
                    await reader
            reader.cancel()
            child.link.close()
            self._bury(child, code, asked, failed)

    async def _talk(self, child: _Child) -> "tuple[_Question | None, pipe.Failed | None]":
        """Ask one question after the other; return the one that got no answer, and a last word."""
        question: _Question | None = None
        try:
            while (question := await child.questions.get()) is not None:
                if question.answer.cancelled():
                    continue
                await child.link.send(question.frame)
                header, body = await child.link.receive()
                answer = pipe.decode_answer(header)
                if isinstance(answer, pipe.Failed):
                    return question, answer
                if not question.answer.done():
                    question.answer.set_result((answer, body))
                question = None
            return None, None
        except (EOFError, OSError):
            return question, None
        except PipeError as error:
            child.reason = child.reason or f"worker: broke the pipe's rules ({error})"
            return question, None
        except asyncio.CancelledError:
            return question, None

    def _bury(
        self,
        child: _Child,
        code: int,
        asked: "_Question | None",
        failed: pipe.Failed | None,
    ) -> None:
        """Settle why it died, and let everybody who waits know."""
        if not child.reason:
            child.reason = _reason(code, failed, child.words)
        self.reason = child.reason
        old = asyncio.get_running_loop().time() - child.born >= GOOD_AGE
        self._failures = 1 if old else self._failures + 1
        self._child = None
        # What the operator can mend is told once, by whoever asked.
        refused = failed is not None and failed.kind == "config"
        level = logging.DEBUG if refused else logging.INFO
        log.log(level, "worker ended", extra={"reason": child.reason, "code": code})
        error: Exception = WorkerDied(child.reason)
        if failed is not None and failed.kind == "config":
            error = WorkerRefused(failed.error)
        waiting = [asked]
        while not child.questions.empty():
            waiting.append(child.questions.get_nowait())
        for question in waiting:
            if question is not None and not question.answer.done():
                question.answer.set_exception(error)

    async def _read_words(self, child: _Child) -> None:
        """Keep what the worker prints: the last lines here, all of it in worker.log."""
        assert child.process.stdout is not None
        rest = b""
        while piece := await child.process.stdout.read(1 << 16):
            *lines, rest = (rest + piece).split(b"\n")
            rest = rest[-_LINE:]
            text = [line[:_LINE].decode(errors="replace").rstrip() for line in lines]
            child.words.extend(line for line in text if line)
            self._write_log(text)
        if rest:
            child.words.append(rest.decode(errors="replace"))
            self._write_log([rest.decode(errors="replace")])

    def _write_log(self, lines: Sequence[str]) -> None:
        if self._log is None or not lines:
            return
        try:
            with self._log.open("a", encoding="utf-8") as file:
                file.write("\n".join(lines) + "\n")
                size = file.tell()
            if size > LOG_BYTES:
                self._log.replace(self._log.with_name(self._log.name + ".1"))
        except OSError as error:
            log.debug("worker.log not written", extra={"error": error.strerror})


def _reason(code: int, failed: pipe.Failed | None, words: Sequence[str]) -> str:
    if failed is not None:
        return f"worker: {failed.error}"
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else "unknown"
        hint = "; out of memory?" if -code == signal.SIGKILL else ""
        return f"worker: killed by signal {-code} ({name}{hint})"
    last = words[-1].strip() if words else "it said nothing"
    return f"worker: ended with code {code}: {last}"


def _kill(pid: int) -> None:
    """Kill the worker and whatever it started: it leads a session of its own."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
