"""The status port: HTTP on loopback. Anyone on this machine may read; changing needs the token."""

import asyncio
import hmac
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, Protocol

import msgspec
from aiohttp import web

from shoal.node.errors import ConfigError
from shoal.node.metrics import Counters, render_family
from shoal.node.status import READY, EventRow, PeerRow, Status

log = logging.getLogger(__name__)

STREAMS = 16
"""Open /events streams; further ones are refused."""
POLL = 0.25
"""Seconds between looks for new events."""
KEEPALIVE = 15.0
"""Seconds after which a silent stream says something, so that dead readers show."""
BODY = 64 << 10
"""Largest request body."""


class Watched(Protocol):
    """What the status port needs of the daemon. The plain calls answer at once, from memory."""

    def status(self) -> Status:
        """Return what the daemon is doing."""

    def peers(self) -> list[PeerRow]:
        """Return the members it knows, itself first."""

    def events(self, after: int) -> list[EventRow]:
        """Return the remembered events with a number above `after`, oldest first."""

    def counters(self) -> Counters:
        """Return the daemon's one set of counters."""

    async def pause(self) -> None:
        """Stop training, go on serving."""

    async def resume(self) -> None:
        """Train again."""

    async def leave(self) -> None:
        """Say good-bye, then stop."""

    async def export(self, path: Path) -> None:
        """Write the shared model to `path`; raises ConfigError or OSError."""


class StatusServer:
    """Serves one daemon's state until stopped.

    Two defences, since browsers reach loopback too: a request whose Host is not this machine is
    refused (DNS rebinding), and the changing calls want the token of the run's directory, which
    no page can read.
    """

    def __init__(
        self, watched: Watched, *, token: str = "", host: str = "127.0.0.1", port: int = 0
    ) -> None:
        self.watched = watched
        self.host = host
        self.port = port
        self.token = token
        """Set before the changing calls can be made; while it is empty nobody can."""
        self._streams = 0
        self._runner: web.AppRunner | None = None

    async def start(self) -> int:
        """Listen and return the port; raise ConfigError when it is taken."""
        app = web.Application(client_max_size=BODY, middlewares=[self._guard])
        app.add_routes(
            [
                web.get("/status", self._status),
                web.get("/peers", self._peers),
                web.get("/events", self._events),
                web.get("/metrics", self._metrics),
                web.get("/healthz", self._healthz),
                web.get("/readyz", self._readyz),
                web.get("/openapi.json", self._openapi),
                web.post("/pause", self._call(self.watched.pause)),
                web.post("/resume", self._call(self.watched.resume)),
                web.post("/leave", self._call(self.watched.leave)),
                web.post("/export", self._export),
            ]
        )
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
        await self._runner.setup()
        site = web.TCPSite(self._runner, self.host, self.port)
        try:
            await site.start()
        except OSError as error:
            await self._runner.cleanup()
            raise ConfigError(
                f"cannot serve status on {self.host}:{self.port} ({error.strerror or error}); "
                "give another port with --status, or 0 for any free one"
            ) from error
        self.port = int(self._runner.addresses[0][1])
        return self.port

    async def stop(self) -> None:
        """Close the port and every stream."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    # ---------------------------------------------------------------- guarding

    @web.middleware
    async def _guard(self, request: web.Request, handler: Any) -> web.StreamResponse:
        """Refuse strangers, turn errors into one JSON line, count the answer."""
        try:
            if not self._host_is_ours(request.headers.get("Host", "")):
                raise web.HTTPForbidden(text="the Host header does not name this machine")
            if request.method == "POST" and not self._token_is_right(request):
                raise web.HTTPUnauthorized(
                    text="this call needs `Authorization: Bearer <token>`; "
                    "the token is in the file `token` of the run's directory"
                )
            response: web.StreamResponse = await handler(request)
        except web.HTTPException as refusal:
            response = _error(refusal.status, refusal.text or refusal.reason)
        except ConfigError as error:
            response = _error(409, str(error))
        except OSError as error:
            response = _error(409, f"{error.filename}: {error.strerror}")
        except Exception:
            log.exception("status request failed", extra={"path": request.path})
            response = _error(500, "a bug in the daemon; its log has the details")
        self.watched.counters().add("http", str(response.status))
        return response

    def _host_is_ours(self, host: str) -> bool:
        name, _, port = host.rpartition(":")
        if not name or host.endswith("]"):
            name, port = host, ""
        names = {self.host, "127.0.0.1", "localhost", "[::1]", "::1"}
        return name in names and port in ("", str(self.port))

    def _token_is_right(self, request: web.Request) -> bool:
        given = request.headers.get("Authorization", "").removeprefix("Bearer ")
        return bool(self.token) and hmac.compare_digest(given.encode(), self.token.encode())

    # ---------------------------------------------------------------- reading

    async def _status(self, request: web.Request) -> web.Response:
        return _json(self.watched.status())

    async def _peers(self, request: web.Request) -> web.Response:
        return _json(self.watched.peers())

    async def _metrics(self, request: web.Request) -> web.Response:
        lines = [*render_gauges(self.watched.status()), *self.watched.counters().render(), ""]
        return web.Response(
            body="\n".join(lines).encode(),
            headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"},
        )

    async def _healthz(self, request: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def _readyz(self, request: web.Request) -> web.Response:
        status = self.watched.status()
        return web.Response(status=200 if status.state in READY else 503, text=f"{status.state}\n")

    async def _openapi(self, request: web.Request) -> web.Response:
        return _json(openapi())

    async def _events(self, request: web.Request) -> web.StreamResponse:
        after = request.query.get("after") or request.headers.get("Last-Event-ID") or "0"
        if not after.isascii() or not after.isdigit() or len(after) > 18:
            raise web.HTTPBadRequest(text=f"after={after!r} is not an event's number")
        if request.query.get("format") == "json":
            return _json(self.watched.events(int(after)))
        if self._streams >= STREAMS:
            raise web.HTTPServiceUnavailable(text=f"{STREAMS} event streams are open already")
        self._streams += 1
        try:
            return await self._stream(request, int(after))
        finally:
            self._streams -= 1

    async def _stream(self, request: web.Request, after: int) -> web.StreamResponse:
        response = web.StreamResponse(
            headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store"}
        )
        await response.prepare(request)
        try:
            async for chunk in self._chunks(after):
                await response.write(chunk)
        except ConnectionResetError:
            pass  # the reader went away
        return response

    async def _chunks(self, after: int) -> AsyncIterator[bytes]:
        silent = KEEPALIVE  # a first comment at once tells the reader that the stream is open
        while True:
            rows = self.watched.events(after)
            for row in rows:
                yield b"id: %d\ndata: %b\n\n" % (row.number, msgspec.json.encode(row))
                after = row.number
            silent = 0.0 if rows else silent + POLL
            if silent >= KEEPALIVE:
                yield b": still here\n\n"
                silent = 0.0
            await asyncio.sleep(POLL)

    # ---------------------------------------------------------------- changing

    def _call(
        self, act: Callable[[], Awaitable[None]]
    ) -> Callable[[web.Request], Awaitable[web.Response]]:
        async def handle(request: web.Request) -> web.Response:
            await act()
            return _json({"done": True})

        return handle

    async def _export(self, request: web.Request) -> web.Response:
        try:
            path = Path(msgspec.json.decode(await request.read(), type=dict[str, str])["path"])
        except (msgspec.DecodeError, KeyError) as error:
            raise web.HTTPBadRequest(text='the body must be {"path": "/where/to.put"}') from error
        if not path.is_absolute():
            raise web.HTTPBadRequest(text=f"{path} is relative; the daemon lives elsewhere")
        await self.watched.export(path)
        return _json({"done": True, "path": str(path)})


def _json(value: object) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), content_type="application/json")


def _error(status: int, text: str) -> web.Response:
    body = msgspec.json.encode({"error": text})
    return web.Response(status=status, body=body, content_type="application/json")


# ---------------------------------------------------------------- what is served


def render_gauges(status: Status) -> list[str]:
    """Return what `/metrics` says beside the counters."""
    gauges: dict[str, tuple[str, float | None]] = {
        "turn": ("The last turn that this peer has taken.", status.turn),
        "steps": ("Local steps done in this run.", status.steps),
        "steps_per_second": (
            "Local steps per second in the last turn, while it trains.",
            status.steps_per_second,
        ),
        "loss": ("Training loss of the last turn.", status.loss),
        "evaluation": ("Held-out measure of the shared model.", status.evaluation),
        "members": ("Peers believed to be here.", status.members),
        "neighbours": ("Open gossip links.", len(status.neighbours)),
        "frontier_updates": ("Updates held without a hole.", status.frontier.updates),
        "lag": ("Updates that it or others hold and its model does not.", status.lag),
        "agrees": ("1 when the swarm is seen to hold one model.", _flag(status.agrees)),
        "published_bytes": ("Payload bytes of own updates.", status.published_bytes),
        "socket_bytes_in": ("Bytes received on TCP sockets.", status.sockets.bytes_in),
        "socket_bytes_out": ("Bytes sent on TCP sockets.", status.sockets.bytes_out),
        "worker_up": ("1 while a worker runs.", _flag(status.worker.pid is not None)),
        "memory_bytes": ("Resident bytes of the daemon.", status.memory),
        "uptime_seconds": ("Seconds since the daemon started.", status.uptime),
    }
    lines = list(
        render_family(
            "shoal_state", "gauge", "1 for what it is doing.", {f'{{state="{status.state}"}}': 1}
        )
    )
    for name, (help_text, value) in gauges.items():
        if value is not None:
            lines += render_family(f"shoal_{name}", "gauge", help_text, {"": value})
    return lines


def _flag(value: bool | None) -> float | None:
    return None if value is None else float(value)


def openapi() -> dict[str, Any]:
    """Return the OpenAPI 3.1 description, its schemas made from the types that are served."""
    (status, peers, events), components = msgspec.json.schema_components(
        [Status, list[PeerRow], list[EventRow]], ref_template="#/components/schemas/{name}"
    )
    text = {"type": "string"}
    done = {"type": "object", "properties": {"done": {"type": "boolean"}}}
    stream = "Events as they come (server-sent); `after` or Last-Event-ID resumes, `format=json`"
    paths: dict[str, Any] = {
        "/status": _operation("get", "What this daemon is doing", "application/json", status),
        "/peers": _operation("get", "The members it knows", "application/json", peers),
        "/events": _operation("get", f"{stream} answers once", "text/event-stream", text),
        "/metrics": _operation("get", "Prometheus' text format", "text/plain", text),
        "/healthz": _operation("get", "200 while the daemon lives", "text/plain", text),
        "/readyz": _operation("get", "200 once it serves the run, else 503", "text/plain", text),
    }
    paths["/events"]["get"]["parameters"] = [
        {"name": "after", "in": "query", "schema": {"type": "integer", "minimum": 0}},
        {"name": "format", "in": "query", "schema": {"type": "string", "enum": ["json"]}},
    ]
    paths["/events"]["get"]["responses"]["200"]["content"]["application/json"] = {"schema": events}
    for call, summary in (
        ("pause", "Stop training, go on serving"),
        ("resume", "Train again"),
        ("leave", "Say good-bye and stop"),
        ("export", "Write the shared model as safetensors to an absolute path"),
    ):
        operation = _operation("post", summary, "application/json", done)
        operation["post"]["security"] = [{"token": []}]
        operation["post"]["responses"]["401"] = {"description": "The token is missing or wrong"}
        paths[f"/{call}"] = operation
    paths["/export"]["post"]["requestBody"] = {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "properties": {"path": text},
                    "required": ["path"],
                }
            }
        },
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "Shoal status", "version": "1"},
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(method: str, summary: str, media: str, schema: Any) -> dict[str, Any]:
    answer = {"description": "OK", "content": {media: {"schema": schema}}}
    return {method: {"summary": summary, "responses": {"200": answer}}}
