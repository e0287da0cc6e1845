"""Membership: the rules one by one, then all of them under random events."""

import dataclasses

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from wdmoe.records import DeviceReport, ExpertId
from wdmoe.transport import membership
from wdmoe.transport.membership import (
    Changed,
    Joined,
    Lost,
    Roster,
    SendAttached,
    SendGoodbye,
    SendWelcome,
)

REPORT = DeviceReport(
    name="kit", hardware="board", system="linux", provider="cpu", threads=1, memory_bytes=1, flops=1.0
)
CATALOGUE = [ExpertId(layer, expert) for layer in range(2) for expert in range(3)]
LEASE_S = 3.0


def hello(roster, key="k", session=1, route=b"c1", now=0.0):
    return roster.hello(key=key, device_id=key.upper(), session=session, route=route, report=REPORT, now=now)


@pytest.fixture
def member():
    """A roster with one device that serves three experts."""
    roster, _ = hello(Roster(lease_s=LEASE_S))
    roster, _ = roster.attach(key="k", session=1, data_route=b"d1", now=0.0)
    roster, _ = roster.place(key="k", generation=5, experts=CATALOGUE[:3])
    roster, _ = roster.ready(key="k", route=b"c1", generation=5, experts=CATALOGUE, now=0.0)
    return roster


def served(roster):
    return set(roster.serving())


def test_join_is_idempotent():
    roster, actions = hello(Roster())
    welcome = SendWelcome(route=b"c1", session=1, device_id="K")
    assert actions == (welcome, Joined(device=roster.devices["k"]))
    again, actions = hello(roster, now=1.0)
    assert actions == (welcome,)
    assert again.devices["k"] == dataclasses.replace(roster.devices["k"], seen_s=1.0)


def test_serves_what_it_was_placed_and_reported(member):
    assert served(member) == set(CATALOGUE[:3])  # it claimed all six
    assert member.orphans(CATALOGUE) == set(CATALOGUE[3:])


def test_a_restart_replaces_its_ghost(member):
    ghost = member.devices["k"]
    roster, actions = hello(member, session=2, route=b"c2", now=1.0)
    device = roster.devices["k"]
    reason = "replaced by a newer session"
    assert actions == (
        SendGoodbye(route=b"c1", reason=reason, retry=False),
        Lost(device=ghost, reason=reason),
        SendWelcome(route=b"c2", session=2, device_id="K"),
        Joined(device=device),
    )
    assert not served(roster)
    for late, _ in (
        hello(roster, session=1, route=b"c1", now=2.0),
        roster.ping(key="k", route=b"c1", now=2.0),
        roster.ready(key="k", route=b"c1", generation=5, experts=CATALOGUE, now=2.0),
        roster.attach(key="k", session=1, data_route=b"d1", now=2.0),
        roster.detach(key="k", data_route=b"d1"),
        roster.goodbye(key="k", route=b"c1"),
    ):
        assert late == roster


def test_two_that_share_a_key_do_not_fight(member):
    roster, _ = hello(member, session=2, route=b"c2")
    same, (goodbye,) = hello(roster, session=1, route=b"c1")
    assert same == roster
    assert not goodbye.retry


def test_a_reconnected_session_keeps_its_work(member):
    roster, (welcome,) = hello(member, route=b"c9", now=1.0)
    assert welcome.route == b"c9"
    assert served(roster) == served(member)
    assert roster.by_route(b"c9") == roster.devices["k"]
    assert roster.by_route(b"c1") is None


def test_silence_beyond_the_lease(member):
    same, actions = member.tick(now=LEASE_S)
    assert (same, actions) == (member, ())
    gone, actions = member.tick(now=LEASE_S + 0.1)
    assert not gone.devices
    reason = "silent for 3.1 s"
    assert actions == (
        SendGoodbye(route=b"c1", reason=reason, retry=True),
        Lost(device=member.devices["k"], reason=reason),
    )
    _, (goodbye,) = gone.ping(key="k", route=b"c1", now=4.0)
    assert goodbye.retry  # "say hello"
    back, _ = hello(gone, now=5.0)  # the same session may come back
    assert back.devices["k"].session == 1
    assert not served(back)


def test_a_ping_renews_the_lease_and_carries_figures(member):
    roster, actions = member.ping(key="k", route=b"c1", now=2.0, done=7, queued=1, rss_bytes=9)
    device = roster.devices["k"]
    assert (actions, device.seen_s, device.done, device.queued, device.rss_bytes) == ((), 2.0, 7, 1, 9)
    assert roster.tick(now=2.0 + LEASE_S) == (roster, ())


def test_attach_is_idempotent_and_needs_the_live_session(member):
    roster, actions = member.attach(key="k", session=1, data_route=b"d1", now=1.0)
    assert actions == (SendAttached(route=b"d1", session=1),)
    _, (goodbye,) = roster.attach(key="k", session=2, data_route=b"d2", now=1.0)
    assert (goodbye.route, goodbye.plane, goodbye.retry) == (b"d2", "data", True)
    moved, actions = roster.attach(key="k", session=1, data_route=b"d2", now=1.0)
    assert actions == (SendAttached(route=b"d2", session=1), Changed(device=moved.devices["k"]))
    assert moved.by_data_route(b"d2") == moved.devices["k"]
    assert moved.by_data_route(b"d1") is None


def test_detach_asks_to_attach_again(member):
    roster, actions = member.detach(key="k", data_route=b"d1")
    assert not served(roster)
    assert actions == (
        Changed(device=roster.devices["k"]),
        SendWelcome(route=b"c1", session=1, device_id="K"),
    )
    assert roster.detach(key="k", data_route=b"d1") == (roster, ())


def test_a_new_placement_stops_the_use_of_what_goes(member):
    roster, _ = member.place(key="k", generation=6, experts=CATALOGUE[2:])
    assert served(roster) == {CATALOGUE[2]}
    stale, _ = roster.ready(key="k", route=b"c1", generation=5, experts=CATALOGUE, now=0.0)
    assert served(stale) == {CATALOGUE[2]}
    fresh, _ = roster.ready(key="k", route=b"c1", generation=6, experts=CATALOGUE[2:], now=0.0)
    assert served(fresh) == set(CATALOGUE[2:])
    assert roster.place(key="k", generation=6, experts=()) == (roster, ())
    assert roster.place(key="nobody", generation=9, experts=()) == (roster, ())


def test_a_revoked_key_is_sent_away(member):
    """That it stays away is up to the allow list: a roster that remembered it barred a device for good."""
    roster, actions = member.revoke(key="k")
    reason = "this device's key is revoked"
    assert actions == (
        SendGoodbye(route=b"c1", reason=reason, retry=False),
        Lost(device=member.devices["k"], reason=reason),
    )
    assert roster.revoke(key="k") == (roster, ())
    again, _ = hello(roster, session=9)
    assert again.devices["k"].session == 9


def test_leaving(member):
    roster, actions = member.goodbye(key="k", route=b"c1")
    assert actions == (Lost(device=member.devices["k"], reason="left"),)
    assert not roster.devices
    assert roster.goodbye(key="k", route=b"c1") == (roster, ())


def test_devices_are_ordered_by_joining(member):
    roster, _ = hello(member, key="a", route=b"c2")
    assert [device.key for device in roster.live()] == ["k", "a"]
    for key, data_route in (("k", b"d1"), ("a", b"d2")):
        roster, _ = roster.attach(key=key, session=1, data_route=data_route, now=0.0)
        roster, _ = roster.place(key=key, generation=7, experts=CATALOGUE)
        route = roster.devices[key].route
        roster, _ = roster.ready(key=key, route=route, generation=7, experts=CATALOGUE, now=0.0)
    assert [device.key for device in roster.serving()[CATALOGUE[0]]] == ["k", "a"]


def test_memory_of_strangers_is_bounded(monkeypatch):
    monkeypatch.setattr(membership, "REMEMBERED_KEYS", 20)
    roster = Roster()
    for number in range(70):
        roster, _ = hello(roster, key=str(number), route=str(number).encode(), now=float(number))
        roster, _ = roster.tick(now=float(number) + 0.5)
    assert len(roster.sessions) == 20


class Cell(RuleBasedStateMachine):
    """Devices that start, restart, speak late and fall silent. The model keeps only what the rules name."""

    sessions = Bundle("sessions")  # (key, session, control route), also of sessions long gone

    @initialize()
    def start(self):
        self.roster, self.now, self.count, self.generation = Roster(lease_s=LEASE_S), 0.0, 0, 0
        self.newest: dict[str, int] = {}  # of a key
        self.last_heard: dict[str, float] = {}
        self.placed: dict[str, set[ExpertId]] = {}
        self.reported: dict[str, set[ExpertId]] = {}  # for the last placement, by the live session
        self.attached: dict[str, bytes] = {}

    def apply(self, outcome):
        self.roster, actions = outcome
        for action in actions:
            if isinstance(action, Lost):
                for record in (self.last_heard, self.placed, self.reported, self.attached):
                    record.pop(action.device.key, None)
        return actions

    def live(self, who):
        key, session, _ = who
        return key in self.last_heard and self.newest[key] == session

    @rule(target=sessions, key=st.sampled_from("abc"))
    def begin(self, key):
        self.count += 1
        who = (key, self.count, b"c%d" % self.count)
        self.say_hello(who)
        return who

    @rule(who=sessions)
    def say_hello(self, who):
        key, session, route = who
        fresh = session > self.newest.get(key, 0)
        actions = self.apply(hello(self.roster, key, session, route, self.now))
        if not fresh and session != self.newest[key]:
            assert [type(action) for action in actions] == [SendGoodbye]
            return
        self.newest[key], self.last_heard[key] = session, self.now

    @rule(who=sessions)
    def ping(self, who):
        before = self.roster
        actions = self.apply(self.roster.ping(key=who[0], route=who[2], now=self.now))
        if self.live(who):
            self.last_heard[who[0]] = self.now
        else:
            assert self.roster == before
            assert [type(action) for action in actions] == [SendGoodbye]

    @rule(who=sessions, generation=st.integers(0, 3), experts=st.sets(st.sampled_from(CATALOGUE)))
    def ready(self, who, generation, experts):
        current = self.generation - generation
        device = self.roster.devices.get(who[0])
        self.apply(self.roster.ready(key=who[0], route=who[2], generation=current, experts=experts, now=self.now))
        if self.live(who):
            self.last_heard[who[0]] = self.now
            if device is not None and device.generation == current:
                self.reported[who[0]] = set(experts) & self.placed.get(who[0], set())

    @rule(key=st.sampled_from("abc"), experts=st.sets(st.sampled_from(CATALOGUE)))
    def place(self, key, experts):
        self.generation += 1
        self.apply(self.roster.place(key=key, generation=self.generation, experts=experts))
        if key in self.last_heard:
            self.placed[key] = set(experts)
            self.reported.setdefault(key, set()).intersection_update(experts)

    @rule(who=sessions, connection=st.integers(0, 1))
    def attach(self, who, connection):
        key, session, route = who
        data_route = route + b"-%d" % connection
        self.apply(self.roster.attach(key=key, session=session, data_route=data_route, now=self.now))
        if self.live(who):
            self.last_heard[key], self.attached[key] = self.now, data_route

    @rule(who=sessions, connection=st.integers(0, 1))
    def detach(self, who, connection):
        data_route = who[2] + b"-%d" % connection
        self.apply(self.roster.detach(key=who[0], data_route=data_route))
        if self.attached.get(who[0]) == data_route:
            del self.attached[who[0]]

    @rule(who=sessions)
    def leave(self, who):
        lived = self.live(who)
        actions = self.apply(self.roster.goodbye(key=who[0], route=who[2]))
        assert [type(action) for action in actions] == ([Lost] if lived else [])

    @rule(key=st.sampled_from("abc"))
    def revoke(self, key):
        lived = key in self.last_heard
        actions = self.apply(self.roster.revoke(key=key))
        assert [type(action) for action in actions] == ([SendGoodbye, Lost] if lived else [])

    @rule(elapsed=st.floats(0, 5))
    def wait(self, elapsed):
        self.now += elapsed
        silent = {key for key, heard in self.last_heard.items() if self.now - heard > LEASE_S}
        actions = self.apply(self.roster.tick(now=self.now))
        assert {action.device.key for action in actions if isinstance(action, Lost)} == silent

    @invariant()
    def exactly_the_newest_sessions_live(self):
        live = {key: device.session for key, device in self.roster.devices.items()}
        assert live == {key: self.newest[key] for key in self.last_heard}
        assert all(device.seen_s == self.last_heard[key] for key, device in self.roster.devices.items())

    @invariant()
    def work_goes_only_to_live_attached_devices_that_reported_it(self):
        serving = {(device.key, expert) for expert, devices in self.roster.serving().items() for device in devices}
        assert serving == {(key, expert) for key in self.attached for expert in self.reported.get(key, set())}
        for device in self.roster.live():
            assert device.data_route == self.attached.get(device.key)


TestCell = Cell.TestCase
TestCell.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
