"""The daemon, from start to stop: lock the state, open the store, listen, serve, drain, close."""

import asyncio
import gc
import logging
import os
import signal
import socket
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack, suppress
from functools import partial
from pathlib import Path

import msgspec

from relay import __version__
from relay.api.app import Api
from relay.api.context import Context
from relay.api.listener import listen
from relay.base.clock import SECOND, Clock
from relay.base.units import render_size
from relay.config.effective import Digests, digests
from relay.config.paths import socket_path
from relay.config.schema import Config
from relay.delivery.dispatcher import StuckLanes
from relay.delivery.owner import Owner
from relay.errors import StorageError, StorageUnavailableError
from relay.ingest.implementation import implementation_of
from relay.ingest.refused import Case
from relay.ingest.server import MAX_CONNECTIONS, Server
from relay.ingest.token_use import EVERY as TOKENS_EVERY
from relay.jobs.activity import Activity
from relay.jobs.backups import Backups
from relay.jobs.database_watch import DATABASE, DatabaseWatch
from relay.jobs.database_watch import EVERY as DATABASE_EVERY
from relay.jobs.disk_forecast import DiskForecast
from relay.jobs.history import History
from relay.jobs.ledger_check import LEDGER, LedgerCheck
from relay.jobs.replay import Replays
from relay.jobs.retention import RETENTION
from relay.jobs.scheduler import Jobs, Past
from relay.metrics import Metrics
from relay.model import Finding
from relay.plugin_loading.loader import Setup
from relay.plugin_loading.observers import Observers
from relay.process.descriptors import connection_cap, limit_accept_errors, raise_limit
from relay.process.health import Health, LoopLag
from relay.process.logs import in_one_line, on_drop
from relay.process.sockets import address, bind, bind_unix, url
from relay.process.state_dir import StateDir
from relay.process.systemd import SOCKET_ADVICE, Inherited, Notifier, is_same_address
from relay.process.watchdog import Watchdog
from relay.reload import Reloads
from relay.routing.router import Router
from relay.state import State
from relay.store import Listener
from relay.store.opening import DISK_RESERVE, clock_of, make_store
from relay.workers.watch import SWEEP, Rulebook

log = logging.getLogger("relay")

FLUSH_EVERY = 2.0  # seconds between flushes of heartbeats that are only in memory
EXPIRE_EVERY = 1.0
FORGET_EVERY = 3600.0
DISK_EVERY = 1.0
RETENTION_EVERY = 10.0  # seconds between passes of retention while the disk is full
OPEN_EVERY = 1.0  # seconds between attempts to open a store that cannot be opened at the moment
LEDGER_EVERY = 15.0
RENEWAL_PATIENCE = 10.0  # seconds without a renewal of leases after which a node counts as cut off
WRITER_PATIENCE = 30.0  # seconds that one transaction may take before the relay counts as stuck

GC_THRESHOLDS = (20_000, 20, 100)
"""Run the cycle collector a thirtieth as often as by default; the default costs a tenth of an event's CPU.

Therefore no reference cycle may hold a body: `tests/daemon/test_memory.py` checks that, `bench/memory.py`
measures it."""


class Addresses(msgspec.Struct, frozen=True):
    """The addresses that the daemon listens on."""

    public: str  # URL
    admin: str | None  # URL; None: off
    socket: Path


Announce = Callable[[], None]


class App:
    """Builds all parts of the daemon; `run` runs them until the daemon stops."""

    def __init__(self, setup: Setup, clock: Clock | None = None) -> None:
        config = setup.config
        self._setup = setup
        is_node = config.is_node and clock is None  # nodes follow the clock of the server
        self.clock = clock = clock or clock_of(config.storage.url.reveal(), shared=is_node)
        self.health = Health()
        self.state_dir = StateDir(config.state_dir)
        self.listener, _ = implementation_of(config.server.implementation)
        self.metrics = Metrics(listener=self.listener)
        self.router, self.rulebook = Router.of(config.destinations), Rulebook.of_config(config)
        self.addresses: dict[str, str] = {}  # URLs of the listeners that are open
        self.listeners: list[Listener] = []  # called after each commit, lanes first
        self.store = make_store(
            config.storage.url.reveal(),
            config.state_dir,
            clock,
            route=self.router.route,
            resolve=self.router.resolve,
            rules=self.rulebook.of,
            listeners=self.listeners,
            on_status_change=self.metrics.count_status_change,
            observe_seconds=self.metrics.commit_seconds.observe,
            observe_requests=self.metrics.commit_events.observe,
            on_fatal=_exit_at_once,
            durability=config.storage.durability,
            min_free=config.storage.min_free_disk,
            reserve=DISK_RESERVE,
            node=config.cluster.node,
            cluster=config.cluster.lease if is_node else None,
            digests=self._digests,
            listen_url=None if (listen := config.storage.listen_url) is None else listen.reveal(),
        )
        self.state = State(
            setup,
            router=self.router,
            rulebook=self.rulebook,
            store=self.store,
            clock=clock,
            metrics=self.metrics,
            explain=self._explain,
        )
        self.ingest, self.dispatcher = self.state.ingest, self.state.dispatcher
        self.watch, self.upkeep = self.state.watch, self.state.upkeep
        self.backups = Backups(self.store, clock, lambda: self.config, self.metrics)
        self.observers = Observers(setup.observers, clock=clock, metrics=self.metrics)
        self.listeners.append(self.dispatcher.listen)
        if setup.observers:
            self.listeners.append(self.observers.listen)
        self.metrics.add_files(self.store.files)
        for kind in setup.kinds.values():
            if kind.preset is None:  # there are dozens of presets for one kind
                self.metrics.plugins.labels(kind.name, kind.version).set(1)
        self.ledger_check = LedgerCheck(self.store, self.dispatcher, self.metrics, clock)
        self.database_watch = DatabaseWatch(self.store, self.metrics, clock)
        self.disk_forecast = DiskForecast(clock, self.metrics, self.store.files.get("main"))
        self.activity = Activity(
            self.store,
            self.ingest,
            self.dispatcher,
            self.metrics,
            clock,
            accepts=lambda: not self.health.reasons(),
        )
        self.history = History(
            self.metrics,
            clock,
            sources=lambda: self.ingest.mounts,
            destinations=lambda: self.dispatcher.lanes,
            pending=self.store.ledger.pending,
        )
        self.loop_lag = LoopLag(self.metrics.lag.set)
        self.jobs = Jobs(clock, self.metrics, self.store.nodes.lead)
        self.owner = Owner(
            self.dispatcher,
            self.store,
            lambda: self.jobs.of_cluster,
            self.state.refresh,
        )
        self.reloads = Reloads(self.state, self.jobs, self.metrics, clock)
        self.replays = Replays(store=self.store, router=self.state.router, clock=clock)
        self.api = Api(
            Context(
                store=self.store,
                state=self.state,
                health=self.health,
                clock=clock,
                registry=self.metrics.registry,
                metrics=self.metrics,
                replays=self.replays,
                reloads=self.reloads,
                jobs=self.jobs,
                owner=self.owner,
                backups=self.backups,
                activity=self.activity,
                history=self.history,
                disk=self.disk_forecast,
                ledger_check=self.ledger_check,
                database_watch=self.database_watch,
                addresses=self.addresses,
                listeners=self.listeners,
            )
        )
        if config.admin.ui:
            from relay.ui.app import Dashboard  # noqa: PLC0415 - it may be off

            self.api.add_pages(
                Dashboard(
                    self.api.ask, self.api.logins, clock, config.cluster.node or socket.gethostname()
                ).routes()
            )
        self.health.watch(self._trouble)
        self.health.watch(self._cut_off)
        self.health.watch(lambda: "; ".join(self._stuck()) or None)
        self.stuck_lanes = StuckLanes(clock)
        self.watchdog = Watchdog(Notifier(), stuck=self._stuck, status=self._summary)
        self.reloads.around = self.watchdog.reloading
        self.reloads.waits_for = lambda: self.store.failure
        self.stopping = asyncio.Event()
        self._announced = False
        self._digested: tuple[Config, Digests] | None = None  # the latest configuration and its digests
        self._retention: asyncio.Task[Past] | None = None  # a pass that started because the disk is full
        self._retention_due = 0  # steady clock: earliest start of the next such pass
        self._deadline = 0.0  # loop time by which requests and attempts in flight must end

    def _explain(self, cases: Sequence[Case]) -> list[tuple[Finding, ...]]:
        """Diagnose refused requests; called in a thread."""
        from relay.diagnosis.refusal import explain  # noqa: PLC0415 - only refused requests need it

        return explain(cases, self.config)

    def _digests(self) -> Digests:
        """Return the digests of the configuration that all nodes of a cluster should share."""
        config = self.config
        if self._digested is None or self._digested[0] is not config:
            self._digested = config, digests(config)
        return self._digested[1]

    @property
    def config(self) -> Config:
        """The current configuration; a reload replaces it."""
        return self.state.config

    async def run(self, on_ready: Callable[[Addresses], None] = lambda _addresses: None) -> None:
        """Run until `stopping` is set.

        Raises:
            RelayError: the daemon could not start; everything opened so far is closed.
        """
        config = self.config
        async with AsyncExitStack() as life:
            self.watchdog.start()
            life.callback(self.watchdog.stop)
            self.state_dir.take()
            life.callback(self.state_dir.release)
            public, admin = self._listeners(life)
            admin_socket = socket_path(config)
            unix = bind_unix(admin_socket)
            life.callback(unix.close)
            life.callback(admin_socket.unlink, missing_ok=True)

            self._warn()
            addresses = Addresses(url(public), None if admin is None else url(admin), admin_socket)
            announce = partial(self._announce, addresses, on_ready)
            if not await self._open_store(public, unix, admin, announce):
                return
            life.push_async_callback(self._close_store)
            self.observers.start()
            life.push_async_callback(self._stop_observers)
            with suppress(StorageError):  # the job repeats it; until then no worker goes offline
                await self.watch.sweep()
            self._add_jobs()
            self.jobs.start()
            life.callback(self.jobs.stop)
            own = [address(sock) for sock in (public, admin) if sock is not None]
            await self.state.start(own)
            life.push_async_callback(self._stop_dispatcher)
            await self.owner.start()
            life.push_async_callback(self.replays.stop)
            life.push_async_callback(self.reloads.close)

            runners = [await listen(self.api.socket_app(), unix, grace=1.0)]
            if admin is not None:
                app = self.api.tcp_app()
                runners.append(await listen(app, admin, grace=1.0))
            for runner in runners:
                life.push_async_callback(runner.cleanup)
            life.callback(self.api.end_streams)
            await self._measure()
            self.loop_lag.start()
            life.callback(self.loop_lag.stop)
            server = Server(
                self.ingest.handle,
                implementation=self.listener,
                max_connections=connection_cap(raise_limit(), MAX_CONNECTIONS),
                unroutable=self.ingest.unroutable,
                is_committing=lambda: self.store.busy > 0,
                overhear=self.ingest.overhear,
            )
            await server.listen(public)
            life.push_async_callback(self._close, server)

            # Reads the history from before the start, while senders are already served.
            life.callback(asyncio.create_task(self.jobs.run("activity")).cancel)
            self.health.phase = None
            announce()
            self.reloads.open()
            await self.stopping.wait()
            self._drain()
        self._log_end()

    async def _measure(self) -> None:
        """Check disk, ledger and database server, and begin the history, before the first request."""
        await self._check_disk()
        await self.ledger_check.check()
        if not self.store.files:
            await self.database_watch.check()
        await self.history.run()

    def _log_end(self) -> None:
        if self.store.unsaved:
            log.critical("stopped; the database has no intact copy, see docs/storage.md, section Losses")
        else:
            log.info("stopped, no events lost")

    def _drain(self) -> None:
        """Start the shutdown: requests and attempts in flight have `shutdown_grace` from now on."""
        self.health.phase = "draining"
        grace = self.config.server.shutdown_grace
        self._deadline = asyncio.get_running_loop().time() + grace
        self.watchdog.stopping()
        log.info("draining: no new requests; requests and attempts in flight have %g s to finish", grace)

    def _announce(self, addresses: Addresses, on_ready: Callable[[Addresses], None]) -> None:
        """Report once that the daemon listens."""
        if not self._announced:
            self._announced = True
            self.addresses["public"] = addresses.public
            if addresses.admin is not None:
                self.addresses["admin"] = addresses.admin
            log.info("hookferry %s listens on %s, admin %s", __version__, addresses.public, addresses.admin)
            self.watchdog.started()
            on_ready(addresses)

    async def _open_store(
        self, public: socket.socket, unix: socket.socket, admin: socket.socket | None, announce: Announce
    ) -> bool:
        """Open the store. While the disk is full or another program locks the file, answer 503 and retry.

        Returns True once the store is open, False if a signal stopped the daemon first.

        Raises:
            StorageError: the file cannot be opened, and waiting does not help.
        """
        try:
            await self.store.open()
        except StorageUnavailableError as error:
            log.error("the store cannot be opened, senders are refused with 503: %s", in_one_line(error))  # noqa: TRY400 - the message has the reason
        else:
            return True
        async with AsyncExitStack() as waiting:
            # On duplicates of the sockets: the originals stay open, so no connection is lost.
            runners = [await listen(self.api.socket_app(), unix.dup(), grace=1.0)]
            if admin is not None:
                app = self.api.tcp_app()
                runners.append(await listen(app, admin.dup(), grace=1.0))
            for runner in runners:
                waiting.push_async_callback(runner.cleanup)
            server = Server(self.ingest.handle, implementation=self.listener)
            await server.listen(public.dup())
            waiting.push_async_callback(self._stop_waiting, server)
            self.health.phase = None
            announce()
            while not self.stopping.is_set():
                with suppress(TimeoutError):
                    async with asyncio.timeout(OPEN_EVERY):
                        await self.stopping.wait()
                    return False
                try:
                    await self.store.open()
                except StorageUnavailableError as error:
                    log.debug("the store cannot be opened yet: %s", error.message)
                else:
                    log.info("the store is open")
                    self.health.phase = "starting"
                    return True
        return False

    async def _stop_waiting(self, server: Server) -> None:
        """Stop the server that answers while the store cannot be opened, after its current requests."""
        server.leave()
        await server.stop_listening()
        await server.finish(1.0)
        await server.close(grace=1.0)

    def _listeners(self, life: AsyncExitStack) -> tuple[socket.socket, socket.socket | None]:
        """Take over the sockets that systemd opened, and bind the others."""
        server, admin = self.config.server, self.config.admin
        inherited = Inherited()
        life.callback(inherited.close)
        public = _inherited(inherited, "public", "server.listen", server.listen) or bind(
            server.listen, "[server] listen"
        )
        life.callback(public.close)
        private = None
        if admin.listen:
            private = _inherited(inherited, "admin", "admin.listen", admin.listen) or bind(
                admin.listen, "[admin] listen"
            )
            life.callback(private.close)
        for name in inherited.names:
            log.warning("systemd opened the socket %r, which the relay does not use", name)
        return public, private

    async def _close(self, server: Server) -> None:
        """Let requests in progress finish; new ones on open connections get 503."""
        server.leave()
        await server.stop_listening()
        self.ingest.admission.draining = True
        await server.finish(self._time_left())
        await server.close(grace=1.0)
        await self._unregister_refused()

    async def _unregister_refused(self) -> None:
        """Unregister the workers whose unregister request was refused during the shutdown."""
        if self.store.failure is None:
            with suppress(StorageError, TimeoutError):
                async with asyncio.timeout(max(1.0, self._time_left())):
                    await self.store.workers.sweep(at=0)

    async def _stop_dispatcher(self) -> None:
        await self.owner.leave()
        await self.dispatcher.stop(self._time_left())
        await self.owner.stop()

    async def _close_store(self) -> None:
        await self.ingest.refused.flush()
        await self.store.close()

    async def _stop_observers(self) -> None:
        await self.observers.stop(self._time_left())

    def _time_left(self) -> float:
        return max(0.0, self._deadline - asyncio.get_running_loop().time())

    def _add_jobs(self) -> None:
        jobs = self.jobs
        jobs.add(SWEEP, self.watch.interval, self.watch.sweep, led=True)
        jobs.add("flush", FLUSH_EVERY, self.store.workers.flush)
        jobs.add("expire", EXPIRE_EVERY, self._expire)
        jobs.add("forget", FORGET_EVERY, self._forget_workers, cluster=True)
        jobs.add(RETENTION, self.upkeep.every, self.upkeep.run, led=True)
        self.backups.look()
        jobs.add("backup", self.backups.every, self.backups.run, cluster=True)
        jobs.add("disk", DISK_EVERY, self._check_disk)
        jobs.add(LEDGER, LEDGER_EVERY, self.ledger_check.check, led=True)
        if not self.store.files:  # a server has them
            jobs.add(DATABASE, DATABASE_EVERY, self.database_watch.check)
        jobs.add("refused", self.ingest.refused.every, self.ingest.refused.run)
        jobs.add("history", self.history.every, self.history.run)
        jobs.add("activity", self.activity.every, self.activity.run)
        jobs.add("tokens", TOKENS_EVERY, self.ingest.token_uses.run)
        for job in self._setup.jobs:
            jobs.add(job.name, job.every, job.work, cluster=not job.everywhere)

    def _trouble(self) -> str | None:
        """Return why the relay refuses senders at the moment; None: it accepts them."""
        if self.store.failure is not None:
            what = "write" if self.store.opened else "be opened"
            return f"the store cannot {what}: {self.store.failure}"
        return "less free space than min_free_disk" if self.ingest.admission.disk_full else None

    def _cut_off(self) -> str | None:
        """Return a reason to be unready if the database does not answer this node of a cluster, else None.

        If the network drops all packets, leases show it before writes do, so a load balancer reacts.
        """
        age = self.store.nodes.figures().get("renewal_age", 0.0)
        if age <= min(RENEWAL_PATIENCE, self.config.cluster.lease) or not self.store.opened:
            return None
        return f"the database has not answered the renewal of this node's leases for {age:.0f} s"

    def _stuck(self) -> list[str]:
        """Return the work that hangs without an outside cause, so that a restart helps."""
        found = []
        if self.store.busy > WRITER_PATIENCE:
            found.append("the store's writer is stuck")
        stuck = self.stuck_lanes.find(self.dispatcher.lanes)
        return found + [f"due deliveries to {name} are not picked up" for name in stuck]

    def _summary(self) -> str:
        if self.health.phase == "draining":
            return "draining"
        if reasons := self.health.reasons():
            return f"not ready: {'; '.join(reasons)}"
        numbers = {"source": len(self.ingest.mounts), "destination": len(self.dispatcher.lanes)}
        return "serving " + " and ".join(f"{n} {noun}{'' if n == 1 else 's'}" for noun, n in numbers.items())

    async def _expire(self) -> None:
        """Expire deliveries that exceed their `ttl`, in short transactions."""
        while await self.store.deliveries.expire():
            pass

    async def _forget_workers(self) -> None:
        """Delete workers that have been offline for a long time, and old worker metrics and commands."""
        await self.store.workers.change(lambda changes: changes.forget_old())
        before = self.clock.wall() - int(self.config.retention.worker_metrics * SECOND)
        while await self.store.upkeep.prune_worker_metrics(before):
            pass
        while await self.store.upkeep.prune_worker_commands(before):
            pass

    async def _check_disk(self) -> None:
        """Refuse senders while less than `min_free_disk` is free; stored events are still delivered.

        Retention runs early if senders are refused, even if there is only too little room for large requests.
        """
        space = await self.store.upkeep.check_disk()
        if space is None:
            return
        full = space.is_full
        if full != self.ingest.admission.disk_full:
            log.log(
                logging.ERROR if full else logging.INFO,
                "%s free in %s, min_free_disk is %s: senders are %s",
                render_size(space.free),
                space.folder,
                render_size(space.floor),
                "refused with 503" if full else "accepted again",
            )
        self.ingest.admission.disk_full = full
        self.disk_forecast.note(space)
        is_due = self.clock.steady() >= self._retention_due
        if (full or space.lacking) and is_due and self.store.failure is None:
            self._retention_due = self.clock.steady() + int(RETENTION_EVERY * SECOND)
            self._retention = asyncio.create_task(self.jobs.run(RETENTION))

    def _warn(self) -> None:
        log.info("the database is %s", self.store.location)
        for warning in self.config.warnings:
            log.warning("%s", warning)


def _inherited(inherited: Inherited, name: str, key: str, listen: str) -> socket.socket | None:
    """Return a socket that systemd opened; log a warning if config.toml names another address."""
    sock = inherited.take(name)
    if sock is not None and not is_same_address(there := url(sock).removeprefix("http://"), listen):
        log.warning(
            '%s: "%s" has no effect: systemd listens on %s; %s', key, listen, there, SOCKET_ADVICE[name]
        )
    return sock


async def serve(setup: Setup) -> None:
    """Run the daemon until SIGTERM or SIGINT; SIGHUP reloads its configuration."""
    gc.set_threshold(*GC_THRESHOLDS)
    app = App(setup)
    on_drop(app.metrics.log_dropped.inc)
    loop = asyncio.get_running_loop()
    limit_accept_errors(loop, app.clock)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, app.stopping.set)
    loop.add_signal_handler(signal.SIGHUP, app.reloads.start)
    try:
        # The collector skips modules and configuration from now on: to look at them takes 30 to 150 ms.
        await app.run(lambda _addresses: gc.freeze())
    except Exception as error:
        if (explained := app.store.explain(error)) is not None:
            raise explained from error
        raise


def _exit_at_once(why: str) -> None:
    """Exit without cleaning up, so that no event is acknowledged that the disk may have lost."""
    log.critical("stopping at once: %s", why)
    logging.shutdown()
    os._exit(1)
