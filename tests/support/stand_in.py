"""A daemon without a swarm: the real status port, a state that moves by itself, nothing else.

Started as a process where a test is about starting, watching and ending daemons. Arguments: its
directory, then how it behaves: good, deaf (ignores SIGTERM), early (dies before it answers),
refuses (the operator's error), late (dies after the first turn), other (ends with another model).
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from shoal.node.http import StatusServer
from shoal.node.metrics import Counters
from shoal.node.status import EventRow, Frontier, PeerRow, Sockets, State, Status, Worker

TURNS = 4
MEASURING = 3.0
"""Seconds from the last turn until the model it ended with is measured."""


class StandIn:
    def __init__(self, folder: Path, manner: str) -> None:
        self.folder, self.manner = folder, manner
        self.state = State.PAUSED
        self.turn = self.measured = 0
        self.done = asyncio.Event()

    def status(self) -> Status:
        return Status(
            version="0",
            peer=self.folder.name,
            run="00" * 32,
            name="stand-in",
            join=(f"/ip4/127.0.0.1/tcp/1/p2p/{self.folder.name}/run/00",),
            state=self.state,
            turn=self.turn,
            turns=TURNS,
            steps=30 * self.turn,
            loss=3.0 - self.turn / 10,
            evaluation=3.5 - self.measured / 10,
            measured=self.measured == self.turn,
            first_evaluation=3.5,
            unit="bits per byte",
            parameters=100_000,
            sockets=Sockets(bytes_out=10_000 * self.turn),
            published_bytes=2_000 * self.turn,
            frontier=Frontier(authors=4, updates=4 * self.turn, hash=f"v{self.turn}"),
            fingerprint="other" if self.manner == "other" else f"f{self.turn}",
            worker=Worker(pid=os.getpid()),
        )

    def peers(self) -> list[PeerRow]:
        return [PeerRow(id=self.folder.name, me=True)]

    def events(self, after: int) -> list[EventRow]:
        return []

    def counters(self) -> Counters:
        return Counters()

    async def pause(self) -> None:
        self.state = State.PAUSED

    async def resume(self) -> None:
        self.state = State.TRAINING

    async def leave(self) -> None:
        self.done.set()

    async def export(self, path: Path) -> None:
        path.write_bytes(b"")

    async def train(self) -> None:
        while True:
            await asyncio.sleep(0.1)
            if self.state is State.TRAINING:
                self.turn += 1
                print(f"turn {self.turn}", flush=True)
                if self.turn == TURNS:
                    self.state = State.FINISHED
                    await asyncio.sleep(MEASURING)
                self.measured = self.turn
                if self.manner == "late":
                    print("MemoryError: out of memory", flush=True)
                    os._exit(7)


async def main(folder: Path, manner: str) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    if manner == "early":
        print("Traceback: something broke", flush=True)
        return 1
    if manner == "refuses":
        print("shoal: --data /nowhere does not exist; name a folder of text", flush=True)
        return 2
    if manner == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        # The worker of a deaf daemon: it must not be left behind either.
        worker = subprocess.Popen(["sleep", "600"])
        (folder / "worker.pid").write_text(str(worker.pid))
    stand_in = StandIn(folder, manner)
    if manner != "deaf":
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stand_in.done.set)
    server = StatusServer(stand_in, token="t")
    port = await server.start()
    (folder / "token").write_text("t")
    part = folder / "status.json.part"
    part.write_text(json.dumps({"host": "127.0.0.1", "port": port}))
    part.replace(folder / "status.json")
    training = asyncio.create_task(stand_in.train())
    await stand_in.done.wait()
    training.cancel()
    await server.stop()
    (folder / "left-cleanly").touch()
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main(Path(sys.argv[1]), sys.argv[2])))
