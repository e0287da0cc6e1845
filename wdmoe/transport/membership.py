"""Which devices are members, decided without I/O: each event gives the next roster and what to do about it.

Every event is a method of the frozen `Roster`; the caller passes its monotonic clock as `now`, keeps the
returned roster and carries out the actions. Trust: `key` is the peer's CURVE public key, proven by the
handshake. On an insecure channel the caller makes one up for each session and finds it again by `by_route`.

Rules
- One live session per key. A device that restarts says Hello with another session: it replaces its ghost,
  and the replaced session never comes back, however late its messages arrive.
- Control messages count only from the control route of the live session, work only goes to its data route.
- A device silent for longer than the lease is lost; it may come back with the same session.
- What a device claims to hold counts only as far as it was placed there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal, TypeAlias

from wdmoe.records import DeviceReport, ExpertId

REMEMBERED_SESSIONS = 8  # per key: a ghost older than that is not recognised as one
REMEMBERED_KEYS = 4096  # bounds memory on an insecure channel, where keys are free
REVOKED = "this device's key is revoked"
NO_EXPERTS: frozenset[ExpertId] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A live member."""

    key: str
    device_id: str  # fingerprint of the key, for people and for Welcome
    session: int
    route: bytes  # of its control connection
    report: DeviceReport
    number: int  # order of joining, never reused: a stable order of devices
    seen_s: float  # clock of its last message
    data_route: bytes | None = None  # None: not attached, gets no work
    generation: int = -1  # of the placement it was told last
    placed: frozenset[ExpertId] = NO_EXPERTS
    ready: frozenset[ExpertId] = NO_EXPERTS  # part of `placed` that it can run
    done: int = 0  # finished runs, queue length and memory by its last ping
    queued: int = 0
    rss_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SendWelcome:
    """Tell a device that its session is live; its Place follows. Also asks a detached one to attach again."""

    route: bytes
    session: int
    device_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SendAttached:
    """Confirm a data connection, on that connection."""

    route: bytes
    session: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SendGoodbye:
    """End whatever the peer on this route believes to have."""

    route: bytes
    reason: str
    retry: bool
    plane: Literal["control", "data"] = "control"


@dataclass(frozen=True, slots=True, kw_only=True)
class Joined:
    """A session became live."""

    device: Device


@dataclass(frozen=True, slots=True, kw_only=True)
class Changed:
    """A live device can serve other experts than before, or began or ceased to be attached."""

    device: Device


@dataclass(frozen=True, slots=True, kw_only=True)
class Lost:
    """A session ended: its work must be sent elsewhere."""

    device: Device
    reason: str


Action: TypeAlias = SendWelcome | SendAttached | SendGoodbye | Joined | Changed | Lost
Outcome: TypeAlias = "tuple[Roster, tuple[Action, ...]]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Roster:
    """All live devices by key, and what must be remembered of others."""

    lease_s: float = 3.0
    devices: Mapping[str, Device] = field(default_factory=lambda: MappingProxyType({}))
    sessions: Mapping[str, tuple[int, ...]] = field(default_factory=lambda: MappingProxyType({}))  # newest last
    joined: int = 0  # devices so far

    # ---- events of the control plane

    def hello(
        self, *, key: str, device_id: str, session: int, route: bytes, report: DeviceReport, now: float
    ) -> Outcome:
        """A device introduces itself; it repeats that until Welcome arrives."""
        known = self.sessions.get(key, ())
        if session in known[:-1]:
            return self, (SendGoodbye(route=route, reason="replaced by a newer session", retry=False),)
        welcome = SendWelcome(route=route, session=session, device_id=device_id)
        live = self.devices.get(key)
        if live is not None and live.session == session:
            return self._with(replace(live, route=route, report=report, seen_s=now)), (welcome,)
        actions: tuple[Action, ...] = ()
        if live is not None:
            actions = self._farewell(live, "replaced by a newer session", retry=False)
        device = Device(
            key=key,
            device_id=device_id,
            session=session,
            route=route,
            report=report,
            number=self.joined,
            seen_s=now,
        )
        joined = replace(self._with(device)._remember(key, session), joined=self.joined + 1)
        return joined, (*actions, welcome, Joined(device=device))

    def heard(self, *, key: str, route: bytes, now: float) -> Outcome:
        """Any other control message arrived: a sign of life. A stranger is asked to say Hello."""
        device = self._speaker(key, route)
        if device is None:
            return self, (SendGoodbye(route=route, reason="no live session; say hello", retry=True),)
        return self._with(replace(device, seen_s=now)), ()

    def ping(
        self, *, key: str, route: bytes, now: float, done: int = 0, queued: int = 0, rss_bytes: int = 0
    ) -> Outcome:
        """As `heard`, with the figures of a Ping."""
        roster, actions = self.heard(key=key, route=route, now=now)
        device = roster._speaker(key, route)
        if device is None:
            return roster, actions
        return roster._with(replace(device, done=done, queued=queued, rss_bytes=rss_bytes)), actions

    def ready(self, *, key: str, route: bytes, generation: int, experts: Iterable[ExpertId], now: float) -> Outcome:
        """The full set of experts a device can run. Of a placement older than the last one, it is only a
        sign of
        life: the device answers the new placement as well."""
        roster, actions = self.heard(key=key, route=route, now=now)
        device = roster._speaker(key, route)
        if device is None or generation != device.generation:
            return roster, actions
        return roster._update(replace(device, ready=device.placed.intersection(experts)), device)

    def goodbye(self, *, key: str, route: bytes) -> Outcome:
        """A device leaves by itself."""
        device = self._speaker(key, route)
        if device is None:
            return self, ()
        return self._without(device), (Lost(device=device, reason="left"),)

    # ---- events of the data plane

    def attach(self, *, key: str, session: int, data_route: bytes, now: float) -> Outcome:
        """A device opened its data connection; it repeats Attach until Attached."""
        device = self.devices.get(key)
        if device is None or device.session != session:
            reason = "no live session; say hello"
            return self, (SendGoodbye(route=data_route, reason=reason, retry=True, plane="data"),)
        attached = replace(device, data_route=data_route, seen_s=now)
        roster, changes = self._update(attached, device)
        return roster, (SendAttached(route=data_route, session=session), *changes)

    def detach(self, *, key: str, data_route: bytes) -> Outcome:
        """A data connection turned out to be gone. The device may not know: Welcome makes it attach again."""
        device = self.devices.get(key)
        if device is None or device.data_route != data_route:
            return self, ()
        roster, changes = self._update(replace(device, data_route=None), device)
        welcome = SendWelcome(route=device.route, session=device.session, device_id=device.device_id)
        return roster, (*changes, welcome)

    # ---- decisions of the base station

    def place(self, *, key: str, generation: int, experts: Iterable[ExpertId]) -> Outcome:
        """A device is told to hold exactly these experts. What it should drop is not used from now on."""
        device = self.devices.get(key)
        if device is None or generation <= device.generation:
            return self, ()
        placed = frozenset(experts)
        told = replace(device, generation=generation, placed=placed, ready=device.ready & placed)
        return self._update(told, device)

    def tick(self, *, now: float) -> Outcome:
        """Time passed: who was silent for longer than the lease is lost."""
        roster = self
        actions: tuple[Action, ...] = ()
        for device in self.live():
            silence_s = now - device.seen_s
            if silence_s > self.lease_s:
                roster = roster._without(device)
                actions += self._farewell(device, f"silent for {silence_s:.1f} s", retry=True)
        return roster, actions

    def revoke(self, *, key: str) -> Outcome:
        """A key was revoked. That it stays out is up to the allow list, which also takes it back."""
        device = self.devices.get(key)
        if device is None:
            return self, ()
        return self._without(device), self._farewell(device, REVOKED, retry=False)

    # ---- questions

    def live(self) -> tuple[Device, ...]:
        """All members in order of joining."""
        return tuple(sorted(self.devices.values(), key=lambda device: device.number))

    def serving(self) -> dict[ExpertId, tuple[Device, ...]]:
        """Experts that can be run now, and by whom (attached and ready), in order of joining."""
        found: dict[ExpertId, tuple[Device, ...]] = {}
        for device in self.live():
            if device.data_route is not None:
                for expert in device.ready:
                    found[expert] = (*found.get(expert, ()), device)
        return found

    def orphans(self, catalogue: Iterable[ExpertId]) -> frozenset[ExpertId]:
        """Experts of the model that nobody can run now."""
        return frozenset(catalogue).difference(self.serving())

    def by_route(self, route: bytes) -> Device | None:
        """The live device behind a control connection."""
        return next((device for device in self.devices.values() if device.route == route), None)

    def by_data_route(self, data_route: bytes) -> Device | None:
        """The live device behind a data connection."""
        return next((device for device in self.devices.values() if device.data_route == data_route), None)

    # ---- inside

    def _speaker(self, key: str, route: bytes) -> Device | None:
        device = self.devices.get(key)
        return device if device is not None and device.route == route else None

    def _with(self, device: Device) -> Roster:
        return replace(self, devices=MappingProxyType({**self.devices, device.key: device}))

    def _without(self, device: Device) -> Roster:
        rest = {key: other for key, other in self.devices.items() if key != device.key}
        return replace(self, devices=MappingProxyType(rest))

    def _update(self, device: Device, before: Device) -> Outcome:
        changed = (device.ready, device.data_route) != (before.ready, before.data_route)
        return self._with(device), (Changed(device=device),) if changed else ()

    def _remember(self, key: str, session: int) -> Roster:
        known = tuple(old for old in self.sessions.get(key, ()) if old != session)
        sessions = {other: past for other, past in self.sessions.items() if other != key}
        sessions[key] = (*known, session)[-REMEMBERED_SESSIONS:]
        for other in list(sessions)[: max(0, len(sessions) - REMEMBERED_KEYS)]:
            if other not in self.devices:
                del sessions[other]
        return replace(self, sessions=MappingProxyType(sessions))

    @staticmethod
    def _farewell(device: Device, reason: str, *, retry: bool) -> tuple[Action, ...]:
        return (
            SendGoodbye(route=device.route, reason=reason, retry=retry),
            Lost(device=device, reason=reason),
        )
