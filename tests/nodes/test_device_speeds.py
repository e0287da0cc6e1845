"""The speeds that placement goes by."""

from __future__ import annotations

from wdmoe.moe.serving_speed import LEAST_ANSWERS, ServingSpeed
from wdmoe.nodes.base_station.device_speeds import CHANGE, MOST, speeds_now


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
