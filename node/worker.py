"""The worker process: started by the daemon, answers its requests over a pipe, dies with it.

`python -m shoal.node.worker FD PARENT` – never started by hand. It is killed by the kernel with the
daemon where that is possible, and ends when the pipe closes. Whatever the user's code prints goes
to stderr, which the daemon keeps as worker.log. Torch is imported only once all this holds, since
that takes seconds; what the worker does is in node/duties.py.
"""

import ctypes
import logging
import os
import select
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Sequence

from shoal.node import pipe
from shoal.node.pipe import Blocking, PipeError

EXIT_CONFIG = 2
EXIT_PIPE = 3
_PR_SET_PDEATHSIG = 1


def failure(error: BaseException) -> pipe.Failed:
    """Return what to tell the daemon: the exception as one line, and whether to try again."""
    from shoal.compression.settings import SettingError
    from shoal.training.method import TrainingError
    from shoal.training.run import RunError

    text = " ".join(str(error).split())
    if isinstance(error, RunError | SettingError | TrainingError):
        return pipe.Failed(text, "config")
    where = traceback.extract_tb(error.__traceback__)[-1:]
    place = f" ({where[0].filename}:{where[0].lineno})" if where else ""
    name = type(error).__name__
    return pipe.Failed(f"{name}: {text}{place}" if text else f"{name}{place}", "crash")


def serve(link: Blocking) -> int:
    """Answer requests until the daemon stops this process or is gone; return the exit code."""
    from shoal.node.duties import Duties

    duties = Duties()
    while True:
        try:
            header, body = link.receive()
        except (EOFError, ConnectionError):
            return 0
        request = pipe.decode_request(header)
        try:
            answer, payload = duties.answer(request, memoryview(body))
        except PipeError:
            raise
        except (Exception, KeyboardInterrupt, SystemExit) as error:
            # The user's code may raise anything; what it leaves behind can't be trusted, so this
            # process ends and the next one starts from the log. Also sys.exit is told here: by the
            # time that torch has ended the process, the daemon may have given up waiting for it.
            traceback.print_exc()
            failed = failure(error)
            link.send(failed)
            return EXIT_CONFIG if failed.kind == "config" else 1
        link.send(answer, payload)
        if isinstance(request, pipe.Stop):
            return 0


def main(arguments: Sequence[str]) -> int:
    """Run the worker on the pipe whose descriptor is the first argument."""
    fd, parent = int(arguments[0]), int(arguments[1])
    die_with(parent)
    sock = socket.socket(fileno=fd)
    sock.set_inheritable(False)
    threading.Thread(target=_end_with, args=(sock,), daemon=True).start()
    sys.stdout = sys.stderr
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s %(message)s")
    try:
        return serve(Blocking(sock))
    except PipeError as error:
        print(f"PipeError: {error}", file=sys.stderr)
        return EXIT_PIPE
    except BrokenPipeError:
        return 0


def die_with(parent: int) -> None:
    """Let the kernel kill this process when the daemon dies (Linux; elsewhere the pipe does)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        os._exit(0)


def _end_with(sock: socket.socket) -> None:
    """End when the daemon has closed the pipe, also in the middle of a turn."""
    poll = select.poll()
    poll.register(sock.fileno(), getattr(select, "POLLRDHUP", select.POLLHUP))
    poll.poll()
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
