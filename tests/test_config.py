"""Settings refuse what cannot work, in one line that names the setting."""

from __future__ import annotations

from pathlib import Path

import pytest

from wdmoe.config import DeviceSettings, LinkEmulation, StationSettings, cache_home, state_home
from wdmoe.errors import ConfigError


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"provider": "abacus"}, "provider must be one of auto, cpu, cuda, tensorrt"),
        ({"threads": 0}, "threads"),
        ({"cache_bytes": -1}, "cache_bytes"),
        ({"memory_bytes": -1}, "memory"),
    ],
)
def test_a_device_refuses(changes, says):
    with pytest.raises(ConfigError, match=says) as caught:
        DeviceSettings(join="token", **changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"policy": "dice"}, "policy must be one of"),
        ({"deadline_s": 0}, "deadline_s"),
        ({"deadline_s": float("nan")}, "deadline_s"),
        ({"lease_s": float("inf")}, "lease_s"),
        ({"wait_for_experts_s": -1}, "wait_for_experts"),
        ({"wait_for_experts_s": float("nan")}, "wait_for_experts"),
        ({"prefill_chunk": 0}, "prefill_chunk"),
        ({"max_active": -1}, "max_active"),
        ({"max_queued": -1}, "max_queued"),
        ({"threads": -1}, "threads"),
    ],
)
def test_a_base_station_refuses(changes, says):
    with pytest.raises(ConfigError, match=says) as caught:
        StationSettings(bundle=Path("bundle"), **changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_a_link_rate_is_zero_or_finite(value):
    with pytest.raises(ConfigError, match="downlink_bps"):
        LinkEmulation(downlink_bps=value)


def test_folders_follow_the_desktop_conventions(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert state_home() == tmp_path / "state" / "wdmoe"
    assert cache_home() == tmp_path / "cache" / "wdmoe"
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", "")  # set but empty counts as not set
    monkeypatch.setenv("HOME", str(tmp_path))
    assert state_home() == tmp_path / ".local" / "state" / "wdmoe"
    assert cache_home() == tmp_path / ".cache" / "wdmoe"
