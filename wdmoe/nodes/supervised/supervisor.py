"""Keeps a base station's engine running in a process of its own, and starts another one when it ends.

async with Supervisor(settings, logs) as station:
    print(station.join_text)
    await station.run()
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from wdmoe.config import StationSettings
from wdmoe.errors import EngineLostError
from wdmoe.nodes.supervised.engine_link import EngineLink
from wdmoe.nodes.supervised.patience import Patience
from wdmoe.nodes.supervised.remote_engine import RemoteEngine
from wdmoe.nodes.supervised.spawner_link import SpawnerLink
from wdmoe.tasks import OpenedInSteps, within

_log = logging.getLogger(__name__)

_REJOIN_S = 10.0  # for devices to come back to a new engine, at least; then requests are told what is missing
_LOOK_S = 0.05
_END_S = 15.0  # for an engine to end in order: it may have a trace to save


class Supervisor(OpenedInSteps):
    """A base station whose model and sockets live in another process. `engine` answers requests.

    Raises (from `async with`):
        Exception: as `BaseStation`.
    """

    join_text: str  # a join token, or the plain address of an insecure station

    def __init__(self, settings: StationSettings, logs: Mapping[str, Any]) -> None:
        """`logs`: see `run_engine`."""
        super().__init__()
        self._settings = settings
        self._logs = logs
        self._patience = Patience()
        self._opened_s = 0.0
        self._barred: set[str] = set()  # ids of devices in quarantine, which outlives an engine
        self._rejoin_s = max(_REJOIN_S, settings.wait_for_experts_s)  # all experts are lost with an engine
        self.engine = RemoteEngine(self._rejoin_s)

    async def run(self) -> None:
        """Start another engine whenever one ends, until cancelled.

        Raises:
            EngineLostError: engines end too soon and too often.
        """
        while True:
            await self._link.lost.wait()
            await self._replace()

    # ---- opening and closing

    async def _open(self) -> None:
        self._spawner = await SpawnerLink.open()
        self._stack.push_async_callback(self._close_spawner)
        facts = await self._start(first=True)
        self._stack.push_async_callback(self._end_engine)
        self.join_text = str(facts["join_text"])
        # A next engine has to be found where this one was.
        bind = f"{self._settings.bind.rpartition(':')[0]}:{facts['control_port']}"
        self._settings = replace(self._settings, bind=bind, data_port=int(facts["data_port"]))
        await self._spawner.warm(facts["modules"])
        self.engine.serve()

    async def _close_spawner(self) -> None:
        await self._spawner.close()

    async def _end_engine(self) -> None:
        self._link.stop()
        try:
            await within(_END_S, self._link.lost.wait())
        except asyncio.TimeoutError:
            _log.warning("the engine process did not end within %.0f s: it is killed", _END_S)
        self._link.cut()

    # ---- engines

    async def _start(self, *, first: bool) -> Mapping[str, Any]:
        ours, its = socket.socketpair()
        self._link = await EngineLink.open(ours, self._barred.add)
        try:
            with its:
                await self._spawner.start(its, self._settings, self._logs, self._barred, first)
            facts = await self._link.opened
        except BaseException:
            self._link.cut()
            raise
        self._opened_s = time.monotonic()
        self.engine.use(self._link, facts)
        return facts

    async def _replace(self) -> None:
        """From the end of one engine to the next one that serves."""
        before = self.engine.state
        self.engine.hold()
        begun_s = time.monotonic()  # each try that fails counts as an engine that ended at once
        how = await self._bury()
        while True:
            wait_s = self._patience.ended(begun_s - self._opened_s)
            if wait_s is None:
                raise EngineLostError(f"the process of the model ended again and again, last by {how}; see the log")
            _log.error("the process of the model ended by %s: starting another one", how)
            await asyncio.sleep(wait_s)
            try:
                await self._start(first=False)
                break
            except Exception as error:
                _log.warning("it did not open: %s", error)
                how = await self._bury()
                self._opened_s = begun_s
        self.engine.restarts += 1
        _log.warning("another process of the model serves after %.1f s", time.monotonic() - begun_s)
        await self._until_served(before)
        self.engine.serve()

    async def _bury(self) -> str:
        """Nothing of the last engine is left after this. How it ended."""
        try:
            return _told(await self._spawner.reap())
        except EngineLostError as error:  # and so did the engine, which ends with it
            await self._spawner.close()
            self._spawner = await SpawnerLink.open()
            return str(error)

    async def _until_served(self, before: str) -> None:
        """Until its devices are back, for some time; they may have been no better `before`."""
        until_s = time.monotonic() + self._rejoin_s
        while time.monotonic() < until_s and not self._link.lost.is_set():
            if (await self.engine.status()).get("state") in ("ok", before):
                return
            await asyncio.sleep(_LOOK_S)


def _told(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
