"""The status port, asked over a real loopback socket."""

import asyncio
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from prometheus_client.parser import text_string_to_metric_families

from shoal.node.client import Client, UnreachableError
from shoal.node.errors import ConfigError
from shoal.node.http import STREAMS, StatusServer, openapi
from shoal.node.metrics import Counters
from shoal.node.status import EventRow, Neighbour, PeerRow, State, Status

TOKEN = "a-token-of-this-run"


class Daemon:
    """A small real object behind the port: it remembers what it was asked to do."""

    def __init__(self) -> None:
        self.state = State.TRAINING
        self.rows: list[EventRow] = [EventRow(number=1, at=1.0, what="joined", peer="12D3KooWa")]
        self.counted = Counters()
        self.asked: list[str] = []

    def status(self) -> Status:
        return Status(
            version="0.1.0",
            peer="12D3KooWa",
            run="ab" * 32,
            name="stdlib-bytes",
            state=self.state,
            turn=3,
            turns=40,
            loss=2.5,
            neighbours=(Neighbour(id="12D3KooWb", rtt=0.003),),
            bytes_out={"push": 10},
        )

    def peers(self) -> list[PeerRow]:
        return [PeerRow(id="12D3KooWa", me=True, turn=3), PeerRow(id="12D3KooWb", state="failed")]

    def events(self, after: int) -> list[EventRow]:
        return [row for row in self.rows if row.number > after]

    def counters(self) -> Counters:
        return self.counted

    async def pause(self) -> None:
        self.asked.append("pause")

    async def resume(self) -> None:
        self.asked.append("resume")

    async def leave(self) -> None:
        self.asked.append("leave")

    async def export(self, path: Path) -> None:
        if path.name == "full":
            raise OSError(28, "No space left on device", str(path))
        if path.name == "early":
            raise ConfigError("the worker has no model yet; try again in a moment")
        if path.name == "bug":
            raise ZeroDivisionError
        self.asked.append(f"export {path}")


class Port:
    """A StatusServer on its own loop in a thread, as the tests ask with blocking sockets."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        self.server = StatusServer(daemon, token=TOKEN)
        self.number = self.do(self.server.start())

    def do(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(200)

    def close(self) -> None:
        self.do(self.server.stop())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()

    def ask(
        self, method: str, path: str, body: str | None = None, **headers: str
    ) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.number, timeout=200)
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        return answer.status, text


@pytest.fixture
def port() -> Iterator[Port]:
    port = Port(Daemon())
    yield port
    port.close()


def client(port: Port, token: str = TOKEN) -> Client:
    return Client("127.0.0.1", port.number, token)


def test_status_and_peers_come_back_as_they_were(port: Port) -> None:
    assert client(port).status() == port.daemon.status()
    assert client(port).peers() == port.daemon.peers()


def test_events_after_a_number_leave_out_the_earlier_ones(port: Port) -> None:
    port.daemon.rows.append(EventRow(number=2, at=2.0, what="failed", details={"after": 3.5}))
    assert [row.number for row in client(port).events()] == [1, 2]
    assert client(port).events(1) == port.daemon.rows[1:]
    assert client(port).events(2) == []


def test_an_event_reaches_an_open_stream(port: Port) -> None:
    stream = open_stream(port, "/events?after=1")
    assert stream.readline() == b": still here\n"
    port.daemon.rows.append(EventRow(number=2, at=2.0, what="left", peer="12D3KooWb"))
    assert stream.readline() == b"\n"
    assert stream.readline() == b"id: 2\n"
    assert json.loads(stream.readline().removeprefix(b"data: "))["what"] == "left"


def test_a_stream_resumes_after_the_last_event_id(port: Port) -> None:
    port.daemon.rows.append(EventRow(number=2, at=2.0, what="left"))
    stream = open_stream(port, "/events", "Last-Event-ID: 1\r\n")
    assert stream.readline() == b"id: 2\n"


def open_stream(port: Port, path: str, header: str = ""):
    connection = socket.create_connection(("127.0.0.1", port.number), timeout=200)
    connection.sendall(f"GET {path} HTTP/1.0\r\nHost: localhost\r\n{header}\r\n".encode())
    stream = connection.makefile("rb")
    connection.close()  # the file keeps it open
    while stream.readline() != b"\r\n":
        pass
    return stream


def test_streams_are_bounded(port: Port) -> None:
    streams = [open_stream(port, "/events") for _ in range(STREAMS)]
    assert port.ask("GET", "/events")[0] == 503
    streams.pop().close()
    until = time.monotonic() + 120
    while port.server._streams == STREAMS:  # noticed at the next write
        port.daemon.rows.append(EventRow(number=len(port.daemon.rows) + 1, at=0.0, what="tick"))
        assert time.monotonic() < until
        time.sleep(0.05)
    for stream in streams:
        stream.close()


def test_stopping_does_not_wait_for_open_streams(port: Port) -> None:
    stream = open_stream(port, "/events")
    port.do(port.server.stop())
    stream.close()


@pytest.mark.parametrize("after", ["-1", "x", "1.5", "9" * 30, "²"])
def test_an_event_number_that_is_none_is_refused(port: Port, after: str) -> None:
    status, text = port.ask("GET", f"/events?after={quote(after)}")
    assert status == 400
    assert "not an event's number" in text


@pytest.mark.parametrize("call", ["pause", "resume", "leave"])
def test_changing_calls_act_with_the_token(port: Port, call: str) -> None:
    client(port).post(call)
    assert port.daemon.asked == [call]


@pytest.mark.parametrize("token", ["", "wrong", "ä", TOKEN + "x"])
@pytest.mark.parametrize("call", ["pause", "resume", "leave", "export"])
def test_changing_calls_without_the_token_change_nothing(port: Port, call: str, token: str) -> None:
    headers = {"Authorization": f"Bearer {token}".encode().decode("latin-1")} if token else {}
    status, text = port.ask("POST", f"/{call}", '{"path": "/tmp/x"}', **headers)
    assert status == 401
    assert "token" in json.loads(text)["error"]
    assert port.daemon.asked == []


def test_before_there_is_a_token_nobody_can_change_anything(port: Port) -> None:
    port.server.token = ""
    assert port.ask("POST", "/pause", Authorization="Bearer ")[0] == 401
    assert port.ask("POST", "/pause")[0] == 401
    assert port.daemon.asked == []


def test_changing_calls_are_not_gets(port: Port) -> None:
    assert port.ask("GET", "/pause", Authorization=f"Bearer {TOKEN}")[0] == 405
    assert port.daemon.asked == []


@pytest.mark.parametrize("host", ["evil.example", "evil.example:{port}", "127.0.0.1:1", "", "a]"])
def test_a_host_that_is_not_this_machine_is_refused(port: Port, host: str) -> None:
    """A page that rebinds its name to 127.0.0.1 still sends its own name as Host."""
    host = host.format(port=port.number)
    assert port.ask("GET", "/status", Host=host)[0] == 403
    assert port.ask("POST", "/pause", Host=host, Authorization=f"Bearer {TOKEN}")[0] == 403


@pytest.mark.parametrize("host", ["localhost", "localhost:{port}", "127.0.0.1", "[::1]:{port}"])
def test_a_host_that_is_this_machine_is_served(port: Port, host: str) -> None:
    assert port.ask("GET", "/status", Host=host.format(port=port.number))[0] == 200


def test_export_hands_over_an_absolute_path(port: Port, tmp_path: Path) -> None:
    client(port).post("export", {"path": str(tmp_path / "out.safetensors")})
    assert port.daemon.asked == [f"export {tmp_path}/out.safetensors"]


@pytest.mark.parametrize(
    ("body", "remedy"),
    [
        ('{"path": "out"}', "relative"),
        ("{}", "path"),
        ("[", "path"),
        ('{"path": "/full"}', "No space left"),
        ('{"path": "/early"}', "try again"),
        ('{"path": "/bug"}', "bug"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_an_export_that_fails_says_why(port: Port, body: str, remedy: str) -> None:
    status, text = port.ask("POST", "/export", body, Authorization=f"Bearer {TOKEN}")
    assert status in (400, 409, 500)
    assert remedy in json.loads(text)["error"]
    with pytest.raises(ConfigError, match="refused /export"):
        client(port).post("export", {"path": "/full"})


def test_a_body_that_is_too_large_is_refused(port: Port) -> None:
    status, _ = port.ask("POST", "/export", "x" * 70_000, Authorization=f"Bearer {TOKEN}")
    assert status == 413


@pytest.mark.parametrize(
    ("state", "code"),
    [(State.JOINING, 503), (State.TRAINING, 200), (State.DEGRADED, 200), (State.LEAVING, 503)],
)
def test_ready_means_that_it_serves_the_run(port: Port, state: State, code: int) -> None:
    port.daemon.state = state
    assert port.ask("GET", "/readyz") == (code, f"{state}\n")
    assert port.ask("GET", "/healthz") == (200, "ok\n")


def test_metrics_are_what_prometheus_reads(port: Port) -> None:
    port.daemon.counted.add("dropped", "bad signature", 3)
    port.daemon.counted.add("dropped", 'a "quoted\\\n" reason')
    _, text = port.ask("GET", "/metrics")
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert samples["shoal_dropped_total", "bad signature"] == 3
    assert samples["shoal_dropped_total", 'a "quoted\\\n" reason'] == 1
    assert samples["shoal_loss",] == 2.5
    assert samples["shoal_state", "training"] == 1
    assert ("shoal_evaluation",) not in samples, "unknown is left out, not zero"


def test_openapi_describes_every_path_that_is_served(port: Port) -> None:
    assert port.server._runner is not None
    app = port.server._runner.app
    served = {
        (route.method.lower(), route.resource.canonical)
        for route in app.router.routes()
        if route.resource is not None and route.method != "HEAD"
    }
    paths = openapi()["paths"]
    described = {(method, path) for path, methods in paths.items() for method in methods}
    assert served - described == {("get", "/openapi.json")}
    assert described <= served
    assert json.loads(port.ask("GET", "/openapi.json")[1]) == json.loads(json.dumps(openapi()))


def test_openapi_refers_only_to_schemas_it_holds() -> None:
    text = json.dumps(openapi())
    held = openapi()["components"]["schemas"]
    for reference in text.split('"$ref": "')[1:]:
        assert reference.split('"')[0].removeprefix("#/components/schemas/") in held
    assert set(held["Status"]["required"]) == {"version", "peer", "run", "name"}


def test_an_unknown_path_is_one_line_of_json(port: Port) -> None:
    status, text = port.ask("GET", "/nothing")
    assert status == 404
    assert json.loads(text)["error"]


def test_a_taken_port_names_the_remedy(port: Port) -> None:
    second = StatusServer(port.daemon, token=TOKEN, port=port.number)
    with pytest.raises(ConfigError, match="--status"):
        port.do(second.start())


def test_asking_where_nobody_listens_is_unreachable() -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        with pytest.raises(UnreachableError):
            Client("127.0.0.1", reserved.getsockname()[1]).status()
