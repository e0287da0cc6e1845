"""The token that a station keeps in a file: it always serves, and no restart leaves tokens behind."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.lab.full_disk import fill, small_disk
from wdmoe.errors import ConfigError
from wdmoe.nodes import join_token_file
from wdmoe.nodes.join_token_file import JoinTokenFile
from wdmoe.transport.security.join_tokens import parse_token
from wdmoe.transport.security.keys import new_key_pair
from wdmoe.transport.security.station_state import make_or_open_state

ENDPOINTS = ("tcp://127.0.0.1:5555",)


def opened(state: Path, uses: int | None = 2, endpoints: tuple[str, ...] = ENDPOINTS) -> JoinTokenFile:
    """As a station that starts does."""
    found = make_or_open_state(state)
    return JoinTokenFile(state / "join-token", found.admission, found.keys, endpoints, uses)


def test_a_restart_uses_it_on_and_another_address_or_a_looser_file_does_not(tmp_path: Path) -> None:
    file = tmp_path / "join-token"
    first = opened(tmp_path).renew()
    assert file.read_text() == f"{first}\n"
    assert file.stat().st_mode & 0o777 == 0o600
    assert opened(tmp_path).renew() == first
    assert len(list((tmp_path / "tokens").iterdir())) == 1
    moved = opened(tmp_path, endpoints=("tcp://192.0.2.7:5555",)).renew()
    assert parse_token(moved).endpoints == ("tcp://192.0.2.7:5555",)
    assert opened(tmp_path, endpoints=("tcp://192.0.2.7:5555",)).renew() == moved
    file.chmod(0o644)  # somebody else may have read it
    assert opened(tmp_path, endpoints=("tcp://192.0.2.7:5555",)).renew() != moved
    assert file.stat().st_mode & 0o777 == 0o600
    file.write_text("wdmoe1.junk")
    assert opened(tmp_path).renew() not in (first, "wdmoe1.junk")


@pytest.mark.parametrize("end", ["used up", "revoked", "deleted", "nearly over"])
def test_what_no_longer_serves_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    monkeypatch.setattr(join_token_file, "LOOK_S", 0.01)
    keeper, file = opened(tmp_path), tmp_path / "join-token"
    first = keeper.renew()
    admission = make_or_open_state(tmp_path).admission  # of another process
    if end == "used up":
        for name in ("one", "two"):
            admission.enrol(parse_token(first).enrolment.public, new_key_pair().public, name)
    elif end == "revoked":
        admission.admit(new_key_pair().public, "kit")
        admission.revoke("kit")
    elif end == "deleted":
        file.unlink()
    else:
        monkeypatch.setattr(join_token_file, "LEAST_LEFT_S", join_token_file.LIFE_S)

    async def until_replaced() -> None:
        keeping = asyncio.create_task(keeper.keep())
        while not file.exists() or (file.read_text().strip() == first) != (end == "deleted"):
            await asyncio.sleep(0.01)
        keeping.cancel()

    asyncio.run(asyncio.wait_for(until_replaced(), 20))
    assert admission.life_left_s(parse_token(file.read_text()).enrolment.public) > 0


def test_without_room_it_is_said_once_and_tried_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with small_disk(tmp_path / "small") as disk:
        keeper = opened(disk / "bs")
        filler = fill(disk)
        with pytest.raises(ConfigError, match="No space left on device"):
            keeper.renew()

        async def keep() -> None:
            join_token_file.LOOK_S, before = 0.01, join_token_file.LOOK_S
            keeping = asyncio.create_task(keeper.keep())
            await asyncio.sleep(0.2)
            assert caplog.text.count("No space left on device") == 1
            filler.unlink()
            while not (disk / "bs" / "join-token").exists():
                await asyncio.sleep(0.01)
            keeping.cancel()
            join_token_file.LOOK_S = before

        asyncio.run(asyncio.wait_for(keep(), 20))
        assert len(list((disk / "bs" / "tokens").iterdir())) == 1
