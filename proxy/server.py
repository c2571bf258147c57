"""F6 server: sockets and signals: the life of the process from its first bind to its exit code.

    serving ── TERM, INT ──► notice ── drain_notice ──► draining ── all ended ──► stopped
                               │                           ├─── drain_timeout ──────┤
                               └───────── a second signal ─┴────────────────────────┘

In `notice` everything is served, only /readyz says 503, so that load balancers look elsewhere. In
`draining` no connection is accepted and no new work begun; what runs may end. HUP reloads.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import math
import signal
import socket
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

try:
    import resource
except ImportError:  # not on Windows
    resource = None  # type: ignore[assignment]

from proxy import logs
from proxy.app import App
from proxy.config import Config, ConfigError
from proxy.downstream import Server
from proxy.errors import ProxyError

log = logging.getLogger("sluice.server")

_BACKLOG = 4096
_OWN_DESCRIPTORS = 32  # of the loop, the listening sockets, the log, lookups of names
_OUT_OF_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_LAST_WORDS = 0.2  # seconds that interrupted answers get to say so
_SWEEP = 1.0  # seconds between two looks at slow heads
_POLL = 0.05  # seconds between two looks at whether a drain is over

# What holds for as long as the process does.
_BOUND = ("listen", "admin", "store", "store_failure", "store_timeout")

Load = Callable[[str | None], Config]


class BindError(Exception):
    """An address can't be listened on."""


class Process:
    """One running proxy. `load` reads the config anew, for a reload; it takes the host to judge it
    for, if not the file's or the command line's."""

    def __init__(self, config: Config, load: Load) -> None:
        self._config = config
        self._load = load
        self._app = App(config)
        self._main = self._app.server(most=_most_clients())
        self._admin = self._app.server(admin=True)
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()

    async def run(self) -> None:
        """Serves until told to stop. Raises BindError if an address can't be listened on."""
        listen, admin = self._config.listen, self._config.admin
        main = await _listen(self._main, listen.host, listen.port)
        listening = [main]
        try:
            if admin.port is not None:
                listening.append(await _listen(self._admin, admin.host, admin.port))
            self._heed_signals()
            asyncio.get_running_loop().set_exception_handler(_LoopTrouble())
            _announce(self._config, main)
            await self._watched(self._until_drained(main))
        finally:
            for each in listening:
                each.close()
            for server in (self._main, self._admin):
                server.pre_shutdown()  # idle connections end at once
            await asyncio.gather(
                self._main.shutdown(_LAST_WORDS), self._admin.shutdown(_LAST_WORDS)
            )
            await self._app.close()
            log.info("stopped")

    async def _watched(self, life: Coroutine[Any, Any, None]) -> None:
        """Runs `life` beside the watches of the process, which end with it."""
        watches = [
            asyncio.create_task(self._sweep()),
            asyncio.create_task(self._app.observer.watch_loop()),
            asyncio.create_task(self._app.keep_leases()),
        ]
        try:
            await life
        finally:
            for watch in watches:
                watch.cancel()
            await asyncio.wait(watches)

    async def _until_drained(self, main: asyncio.Server) -> None:
        await self._stop.wait()
        await self._drain(main)

    def _heed_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._told_to_stop)
        loop.add_signal_handler(signal.SIGHUP, self._reload)

    def _told_to_stop(self) -> None:
        (self._hurry if self._stop.is_set() else self._stop).set()

    async def _drain(self, main: asyncio.Server) -> None:
        fields = {
            "open": len(self._app.observer.in_flight),
            "timeout": self._config.drain_timeout,
            "hint": "a second signal ends them now",
        }
        log.info("draining", extra={"fields": fields})
        self._app.draining = True
        await self._unless_hurried(self._config.drain_notice)
        self._app.refusing = True
        main.close()
        deadline = asyncio.get_running_loop().time() + self._config.drain_timeout
        while self._busy and not self._hurry.is_set():
            left = deadline - asyncio.get_running_loop().time()
            if left <= 0:
                break
            await self._unless_hurried(min(_POLL, left))
        for exchange in list(self._app.observer.in_flight.values()):
            exchange.interrupt(
                ProxyError(
                    "shutting_down", "The proxy was shut down before this answer's end.", close=True
                )
            )

    @property
    def _busy(self) -> bool:
        """Whether an answer is not whole, or its reader has not taken all of it."""
        return bool(self._app.observer.in_flight) or self._main.owes

    async def _unless_hurried(self, seconds: float) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._hurry.wait(), seconds)

    def _reload(self) -> None:
        """A valid file holds from now on; an invalid one changes nothing.

        It is judged twice, as it stands and for the address that is bound: a file that moves
        `listen` to loopback must not open the keys in it to where the socket still is.
        """
        try:
            config = self._load(None)
            self._load(self._config.listen.host)
            self._app.reload(config)
        except (ConfigError, OSError, ValueError) as error:
            self._app.observer.reloaded("rejected")
            for problem in str(error).splitlines():
                log.error("reload_rejected", extra={"fields": {"problem": problem}})
            return
        bound = {key: getattr(self._config, key) for key in _BOUND}
        for key, value in bound.items():
            if getattr(config, key) != value:
                log.warning("restart_needed", extra={"fields": {"key": key}})
        self._config = config.model_copy(update=bound)
        logs.configure(config.log.format, config.log.level)
        self._app.observer.reloaded("applied")
        log.info("reloaded")

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP)
            self._main.sweep()
            self._admin.sweep()
            self._app.sweep()


def _most_clients() -> float:
    """How many clients may be connected at a time, with as many descriptors as this process may have:
    so many that each one's upstream connection finds one too. Else a flood of idle connections would
    fail the requests of all others."""
    if resource is None:
        return math.inf
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # some systems take less than they say
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    return math.inf if soft == resource.RLIM_INFINITY else (soft - _OWN_DESCRIPTORS) // 2


class _LoopTrouble:
    """Logs what the loop reports. That it can't accept, asyncio's says again and again, for each of
    up to `_BACKLOG` connections and every second: once a minute will do."""

    def __init__(self) -> None:
        self._quiet_until = 0.0

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if not isinstance(error, OSError) or error.errno not in _OUT_OF_RESOURCES:
            loop.default_exception_handler(context)
        elif loop.time() >= self._quiet_until:
            self._quiet_until = loop.time() + 60
            log.error("not_accepting", extra={"fields": {"problem": error.strerror}})


async def _listen(server: Server, host: str, port: int) -> asyncio.Server:
    try:
        return await asyncio.get_running_loop().create_server(server, host, port, backlog=_BACKLOG)
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno == errno.EADDRINUSE:
            reason = "the port is in use; choose another (--port)"
        raise BindError(f"can't listen on {host}:{port}: {reason}") from error


def _announce(config: Config, main: asyncio.Server) -> None:
    upstreams = [
        f"{name} ({'the embedded demo: made-up answers' if each.demo else each.base_url})"
        for name, each in config.upstreams.items()
    ]
    fields = {"url": _url(main.sockets[0]), "upstreams": ", ".join(upstreams)}
    log.info("listening", extra={"fields": fields})
    spendable = [name for name, each in config.upstreams.items() if each.spends]
    if config.open and spendable:
        hint = "whoever reaches this address spends the keys of these upstreams"
        log.warning("open", extra={"fields": {"upstreams": ", ".join(spendable), "hint": hint}})


def _url(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
