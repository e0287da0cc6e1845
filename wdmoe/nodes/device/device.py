"""The device program: joins a base station, holds the experts it is given, runs them until told to stop.

Two parts, each with its own sockets: an event loop for the control plane (`DeviceSession`) and one thread for
the data plane (`ComputeThread`). Thread, experts and counters live as long as the process; sessions come and go.
"""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from wdmoe.config import DeviceSettings
from wdmoe.errors import ProtocolError, RefusedError, TransportError
from wdmoe.moe.expert import ExpertRunner
from wdmoe.nodes.device import hardware
from wdmoe.nodes.device.broadcast_receiver import RadioSite
from wdmoe.nodes.device.compute_thread import ComputeThread
from wdmoe.nodes.device.expert_cache import ExpertCache
from wdmoe.nodes.device.expert_opening import ExpertOpener, expert_opener
from wdmoe.nodes.device.expert_store import ExpertStore
from wdmoe.nodes.device.join import Dialer, introduce, open_dialer
from wdmoe.nodes.device.rules import Retries
from wdmoe.nodes.device.session import DeviceSession
from wdmoe.nodes.memory import free_memory_bytes
from wdmoe.records import DeviceReport
from wdmoe.tasks import in_thread, run_together
from wdmoe.transport.channel import ControlLink
from wdmoe.transport.codec.messages import Goodbye, Hello, Place, Welcome

log = logging.getLogger(__name__)

WORKERS = 3  # threads for files and for loading: a pool that grows when it likes takes memory from a small board
FAREWELL_S = 0.05  # for the last message to get out
FIRST_MEASURE_S = 20.0  # after the start, about; and then in between
NEXT_MEASURE_S = 600.0
IDLE_S = 1.0  # without work before the speed is measured
SAME_SPEED = 1.25  # speeds that differ by less are one


async def run_device(settings: DeviceSettings) -> None:
    """Run a device until cancelled; it says goodbye, then the cancel goes on. Nothing it started is left.

    Raises:
        ConfigError: the join token, the key file or the provider can't be used.
        Exception: a bug in the computing thread, as it was raised there.
    """
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(WORKERS, "wdmoe-worker"))
    dialer = open_dialer(settings)
    try:
        opener = await in_thread(lambda: expert_opener(settings))
        try:
            await _run(settings, dialer, opener)
        finally:
            opener.close()
    finally:
        dialer.close()


async def _run(settings: DeviceSettings, dialer: Dialer, opener: ExpertOpener) -> None:
    report = _report(settings, opener)
    log.info("%s: %s, %s, %.1f GFLOP/s", report.name, report.hardware, report.provider, report.flops / 1e9)
    runner = ExpertRunner(opener.open)
    cache = await in_thread(lambda: ExpertCache(settings.cache, settings.cache_bytes))
    crash: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    compute = ComputeThread(runner, settings.link, _reporter(crash))
    radio = RadioSite(open_tuner=dialer.tuner, cache=cache, threads=settings.threads, save=settings.save_pictures)
    member = _Member(dialer, report, ExpertStore(runner, cache, report.memory_bytes), compute, radio)
    compute.start()
    try:
        await run_together(member.stay_joined(), member.measure_again(opener.measure), _watch(crash))
    finally:
        await in_thread(compute.stop)


def _report(settings: DeviceSettings, opener: ExpertOpener) -> DeviceReport:
    return DeviceReport(
        name=settings.name or socket.gethostname(),
        hardware=hardware.board_name(),
        system=hardware.system_name(),
        provider=opener.provider,
        threads=settings.threads,
        memory_bytes=settings.memory_bytes or free_memory_bytes() // 2,
        flops=opener.flops,
        downlink_snr_hz=settings.link.downlink_snr_hz,
        uplink_snr_hz=settings.link.uplink_snr_hz,
    )


def _reporter(crash: asyncio.Future[None]) -> Callable[[BaseException], None]:
    """Carries an exception from another thread into a future of this loop."""
    loop = asyncio.get_running_loop()

    def settle(error: BaseException) -> None:
        if not crash.done():
            crash.set_exception(error)

    def report(error: BaseException) -> None:
        loop.call_soon_threadsafe(settle, error)

    return report


async def _watch(crash: asyncio.Future[None]) -> None:
    await crash


class _Member:
    """Goes from session to session."""

    def __init__(
        self, dialer: Dialer, report: DeviceReport, store: ExpertStore, compute: ComputeThread, radio: RadioSite
    ) -> None:
        self._dialer = dialer
        self._radio = radio
        self._report = report
        self._store = store
        self._compute = compute
        self._session = secrets.randbits(64)
        self._chance = random.Random(self._session)  # noqa: S311  # jitter, no secret
        self._retries = Retries(self._chance)
        self._enrol_next = dialer.must_enrol
        self._enrolled = not dialer.must_enrol  # the own key may be known to the base station
        self._live: DeviceSession | None = None
        self._place: Place | None = None  # last one followed, of the bundle below
        self._manifest_sha256 = ""

    async def stay_joined(self) -> None:
        """Join, serve, and join again whenever that ends, slowly where the station does not want this device."""
        while True:
            refused = False
            try:
                await self._join_and_serve()
            except RefusedError as error:
                refused = True
                self._compute.hang_up()
                reason = str(error)
                self._enrol_next = self._dialer.can_enrol and not self._enrol_next
            except (TransportError, ProtocolError) as error:
                reason = str(error)
                if self._enrolled:  # an enrolment that hears nothing must not keep the own key from its turn
                    self._enrol_next = False
            delay_s, tell = self._retries.failed(reason, refused, time.monotonic())
            log.log(logging.WARNING if tell else logging.DEBUG, "%s; trying again in %.1f s", reason, delay_s)
            await asyncio.sleep(delay_s)

    async def measure_again(self, measure: Callable[[], float]) -> None:
        """Now and then measure the speed while nothing is computed, and say so where it is another one.

        The first measurement is made while everything starts, maybe many devices on one machine.
        """
        wait_s = FIRST_MEASURE_S
        while True:
            await asyncio.sleep(self._chance.uniform(0.5, 1.5) * wait_s)
            done = self._compute.done
            await asyncio.sleep(IDLE_S)
            if self._compute.done > done or self._compute.queued:
                continue
            wait_s = NEXT_MEASURE_S
            flops = await in_thread(measure)
            if not self._report.flops / SAME_SPEED < flops < self._report.flops * SAME_SPEED:
                log.info("measured %.1f GFLOP/s, before %.1f", flops / 1e9, self._report.flops / 1e9)
                self._report = replace(self._report, flops=flops)
                if self._live is not None:
                    self._live.introduce_again(Hello(session=self._session, report=self._report))

    async def _join_and_serve(self) -> None:
        self._dialer.turn_to(self._retries.failures)
        if self._enrol_next:
            await self._enrol()
        link = self._dialer.control()
        try:
            welcome = await introduce(link, Hello(session=self._session, report=self._report))
            await self._serve(link, welcome)
        except asyncio.CancelledError:
            await _say_goodbye(link)
            raise
        finally:
            link.close()

    async def _enrol(self) -> None:
        """Have the own key admitted, on a connection made with the token's key."""
        link = self._dialer.enrolment()
        try:
            hello = Hello(session=self._session, report=self._report, enrol_key=self._dialer.public_key)
            await introduce(link, hello)
        finally:
            link.close()
        self._enrol_next, self._enrolled = False, True
        log.info("enrolled at %s", self._dialer.endpoint)

    async def _serve(self, link: ControlLink, welcome: Welcome) -> None:
        log.info("joined %s at %s as %s", welcome.model, self._dialer.endpoint, welcome.device_id)
        self._retries.succeeded()
        if welcome.manifest_sha256 != self._manifest_sha256:
            self._manifest_sha256 = welcome.manifest_sha256
            self._place = None
        if welcome.data_port:  # a broadcast has no work for experts
            self._compute.connect(self._dialer.data_opener(welcome.data_port), self._session)
        session = DeviceSession(link, welcome, self._store, self._compute, self._place, self._keep, self._radio)
        self._live = session
        try:
            await session.run()
        finally:
            self._live = None

    def _keep(self, place: Place) -> None:
        self._place = place


async def _say_goodbye(link: ControlLink) -> None:
    """So that the base station needn't wait for the lease to end. It may be gone itself."""
    try:
        await link.send(Goodbye(reason="this device was stopped"))
    except (TransportError, RefusedError) as error:
        log.debug("no goodbye: %s", error)
    else:
        await asyncio.sleep(FAREWELL_S)
