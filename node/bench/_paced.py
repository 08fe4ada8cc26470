"""A worker that does everything but train: it applies, encodes and publishes, paced by a clock.

`python -m shoal.node.bench._paced SECONDS FD PARENT`: a turn takes SECONDS of sleep, whatever the
run says. So a benchmark of one peer has another to talk to that needs next to no processor.
"""

import sys
import time

import torch

from shoal.node import duties, pipe, worker


class Paced(duties.Duties):
    """Duties whose turns are sleep, and whose updates are small noise."""

    seconds = 1.0

    def _turn(self, asked: pipe.Turn) -> tuple[pipe.Answer, list[pipe.Buffer]]:
        began = time.perf_counter()
        trainer = self._ready()
        self._discard()
        noise_D = 1e-4 * torch.randn(trainer.parameters)
        payload = trainer.exchange.publish(
            noise_D, 1 / asked.members, turn=asked.turn, key=asked.turn
        )
        self._pending = True
        time.sleep(max(0.0, self.seconds - (time.perf_counter() - began)))
        answer = pipe.Turned(
            kind=trainer.exchange.rules.planes[0].kind,
            loss=None,
            evaluation=None,
            steps=1,
            seconds=self.seconds,
        )
        return answer, [payload]


if __name__ == "__main__":
    Paced.seconds = float(sys.argv[1])
    duties.Duties = Paced  # type: ignore[misc]  # what worker.serve takes when it begins
    sys.exit(worker.main(sys.argv[2:]))
