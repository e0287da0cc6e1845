"""Homes that move away from slow devices and back, and the speeds that placement goes by."""

from __future__ import annotations

import itertools
import random

from wdmoe.moe.serving_speed import LEAST_ANSWERS, ServingSpeed
from wdmoe.nodes.base_station.device_speeds import CHANGE, MOST, speeds_now
from wdmoe.nodes.base_station.slow_homes import (
    AWAY,
    FIRST_TERM_S,
    HOME,
    LONGEST_TERM_S,
    NO_LAYER,
    SLOW_LOOKS,
    TRIAL,
    Standing,
    away_from,
    next_standings,
)
from wdmoe.records import ExpertId

FAST_S = 0.004


class Cluster:
    """Four devices of which "a" may be slow. Paces are running means, as the data plane keeps them."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.standings: dict[str, Standing] = {}
        self.pace = dict.fromkeys("abcd", FAST_S)
        self.chance = random.Random(1)

    def look(self, slow_s: float, answers: int = 8) -> str:
        """A second with so many answers of each that is asked; where a is afterwards."""
        for name in "abcd":
            true_s = slow_s if name == "a" else FAST_S
            asked = answers if name != "a" or self.state != AWAY else 0
            for _ in range(asked):
                self.pace[name] += 0.1 * (true_s * self.chance.uniform(0.9, 1.1) - self.pace[name])
        self.now_s += 1
        self.standings = next_standings(self.standings, self.pace, self.now_s)
        return self.state

    @property
    def state(self) -> str:
        return self.standings.get("a", Standing()).state


def test_a_slow_device_leaves_within_some_answers_and_comes_back_when_it_recovers() -> None:
    cluster = Cluster()
    assert {cluster.look(FAST_S) for _ in range(50)} == {HOME}
    assert [cluster.look(0.5) for _ in range(int(SLOW_LOOKS))][-1] == AWAY
    seen = [cluster.look(FAST_S) for _ in range(60)]
    assert seen.count(TRIAL) <= 10
    assert seen[-1] == HOME
    assert seen.index(TRIAL) <= FIRST_TERM_S


def test_one_that_stays_slow_is_tried_more_and_more_seldom() -> None:
    cluster = Cluster()
    seen = [cluster.look(0.5) for _ in range(4000)]
    moves = sum(a != b for a, b in itertools.pairwise(seen))
    assert seen.count(AWAY) > 0.97 * len(seen)
    assert moves < 30
    assert cluster.standings["a"].term_s == LONGEST_TERM_S


def test_one_that_is_slow_every_other_moment_does_not_flap() -> None:
    cluster = Cluster()
    seen = [cluster.look(0.5 if second // 20 % 2 else FAST_S) for second in range(4000)]
    assert sum(a != b for a, b in itertools.pairwise(seen)) < 60


def test_a_hiccup_moves_nothing() -> None:
    cluster = Cluster()
    for second in range(200):
        assert cluster.look(0.05 if second % 10 == 0 else FAST_S) == HOME


def test_where_all_are_slow_nobody_leaves() -> None:
    standings: dict[str, Standing] = {}
    for second in range(60):
        standings = next_standings(standings, dict.fromkeys("abc", 0.5 + second / 1000), float(second))
    assert {each.state for each in standings.values()} == {HOME}


def test_a_slow_device_that_is_asked_no_more_leaves_too() -> None:
    """The data plane works around it at once: there may be no second look with new answers."""
    standings: dict[str, Standing] = {}
    for second, pace in enumerate((FAST_S, 0.3, 0.3, 0.3)):
        standings = next_standings(standings, {"a": pace, "b": FAST_S, "new": None}, float(second))
    assert [standings[name].state for name in ("a", "b", "new")] == [AWAY, HOME, HOME]


def test_a_trial_without_answers_goes_on() -> None:
    trial = {"a": Standing(TRIAL, 0.0, pace_s=0.5)}
    for second in range(200):
        trial = next_standings(trial, {"a": 0.5, "b": FAST_S}, float(second))
    assert trial["a"].state == TRIAL
    assert next_standings(trial, {"b": FAST_S}, 99.0).keys() == {"b"}  # a lost device is forgotten


def test_on_trial_it_has_one_layer() -> None:
    targets = {ExpertId(layer, 0): "a" if layer else "b" for layer in range(4)}
    standings = {"a": Standing(TRIAL), "b": Standing(HOME), "c": Standing(AWAY)}
    assert away_from(standings, targets) == {"a": 1, "c": NO_LAYER}


def test_who_served_counts_by_what_it_showed() -> None:
    reported = {"a": 30e9, "b": 2.3e7, "c": 30e9}  # b was measured while everything started
    assert speeds_now(reported, {}, {}) == reported
    speeds = speeds_now(reported, {"a": 1.0, "b": 1.0}, reported)
    assert speeds["b"] == 30e9
    assert speeds_now(reported, {"b": 1.2}, speeds) == speeds  # no other speed, so nothing moves
    assert speeds_now(reported, {"b": 1.01 * CHANGE}, speeds)["b"] > speeds["b"]
    lies = speeds_now({"a": 30e9, "b": float("inf"), "c": 30e9}, {"a": 1e30}, {})
    assert lies["a"] == MOST * 30e9


def test_speed_is_learnt_from_serving() -> None:
    speed = ServingSpeed()
    for _ in range(LEAST_ANSWERS):
        speed.saw("a", 2, 4e-5)
        speed.saw("b", 1, 2e-5)
        speed.saw("c", 4, 32e-5)
    speed.saw("new", 1, 1.0)
    assert {name: round(ratio, 3) for name, ratio in speed.against_usual().items()} == {"a": 1, "b": 1, "c": 0.25}
    assert ServingSpeed().against_usual() == {}
