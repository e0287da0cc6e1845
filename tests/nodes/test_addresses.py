"""Where devices find the base station, and what a token made beside a running one says."""

from __future__ import annotations

from pathlib import Path

import pytest

from wdmoe.errors import ConfigError
from wdmoe.nodes.addresses import LAST_ENDPOINTS, data_bind, dial_endpoints, last_endpoints, remember_endpoints


def test_the_data_plane_sits_beside_the_control_plane() -> None:
    assert data_bind("tcp://0.0.0.0:5555", "tcp://*:5555", 0) == "tcp://0.0.0.0:5556"
    assert data_bind("tcp://0.0.0.0:5555", "tcp://*:5555", 7000) == "tcp://0.0.0.0:7000"
    assert data_bind("tcp://127.0.0.1:41234", "tcp://127.0.0.1:*", 0) == "tcp://127.0.0.1:*"


def test_a_token_never_says_everywhere() -> None:
    assert dial_endpoints("tcp://127.0.0.1:5555", "") == ("tcp://127.0.0.1:5555",)
    assert dial_endpoints("tcp://0.0.0.0:5555", "bs.lan") == ("tcp://bs.lan:5555",)
    assert all("0.0.0.0" not in each and "*" not in each for each in dial_endpoints("tcp://0.0.0.0:5555", ""))  # noqa: S104


@pytest.mark.parametrize("advertise", ["tcp://bs", "a b", "*", "bs\n"])
def test_what_is_no_address_is_refused(advertise: str) -> None:
    with pytest.raises(ConfigError, match="advertise"):
        dial_endpoints("tcp://0.0.0.0:5555", advertise)


def test_a_token_made_beside_a_running_station_fits_it(tmp_path: Path) -> None:
    remember_endpoints(tmp_path, ("tcp://192.0.2.7:6000",))
    assert last_endpoints(tmp_path) == ("tcp://192.0.2.7:6000",)


def test_without_a_note_the_default_stands(tmp_path: Path) -> None:
    assert last_endpoints(tmp_path) == dial_endpoints("tcp://*:5555", "")


@pytest.mark.parametrize("content", ["", "[]", '{"endpoints": []}', '{"endpoints": [1]}', '{"endpoints": "x"}'])
def test_a_note_that_cannot_be_used_is_no_reason_to_guess(tmp_path: Path, content: str) -> None:
    """It made a token for an address that was never asked for, with exit code 0."""
    (tmp_path / LAST_ENDPOINTS).write_text(content)
    with pytest.raises(ConfigError, match=r"endpoints\.json is damaged"):
        last_endpoints(tmp_path)
    (tmp_path / LAST_ENDPOINTS).unlink()
    (tmp_path / LAST_ENDPOINTS).mkdir()
    with pytest.raises(ConfigError, match=r"endpoints\.json cannot be read"):
        last_endpoints(tmp_path)
