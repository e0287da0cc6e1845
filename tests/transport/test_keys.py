"""Key files, fingerprints, join tokens and the allow list."""

from __future__ import annotations

import base64
import json
import logging
import time
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.lab.command import fails, run
from tests.lab.full_disk import fill, small_disk
from wdmoe.errors import ConfigError, RefusedError
from wdmoe.transport.security.admission import Admission
from wdmoe.transport.security.join_tokens import JoinToken, parse_token
from wdmoe.transport.security.keys import (
    device_keys,
    fingerprint,
    is_key,
    load_or_create,
    new_key_pair,
    pair_of_secret,
    station_keys,
)
from wdmoe.transport.security.station_state import make_or_open_state

ENDPOINTS = ("tcp://192.168.1.2:5555", "tcp://10.0.0.1:5555")


@pytest.fixture
def admission(tmp_path: Path) -> Admission:
    return Admission(tmp_path)


def test_a_key_survives_restarts_and_only_its_owner_can_read_it(tmp_path: Path) -> None:
    state = tmp_path / "new" / "state"
    first = station_keys(state)
    assert station_keys(state) == first
    assert (state / "station.key").stat().st_mode & 0o777 == 0o600
    assert state.stat().st_mode & 0o777 == 0o700
    assert device_keys(state) != first
    assert sorted(file.name for file in state.iterdir()) == ["device.key", "station.key"], "no temporary file stays"


def test_a_state_folder_without_room_gets_no_half_key(tmp_path: Path) -> None:
    pair = station_keys(tmp_path / "bs")
    token = Admission(tmp_path / "bs").create_token(pair, list(ENDPOINTS), 60.0).text()
    with small_disk(tmp_path / "small") as disk:
        filler = fill(disk)
        line = fails(run("device", "--join", token, "--state", str(disk / "state")))
        assert "No space left on device" in line
        assert str(disk / "state") in line
        assert not [path for path in (disk / "state").rglob("*") if path.is_file()]
        filler.unlink()
        assert device_keys(disk / "state") == device_keys(disk / "state")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o666])
def test_a_key_file_that_others_may_touch_is_refused_with_the_cure(tmp_path: Path, mode: int) -> None:
    station_keys(tmp_path)
    (tmp_path / "station.key").chmod(mode)
    with pytest.raises(ConfigError, match=r"chmod 600 .*station\.key"):
        station_keys(tmp_path)


@pytest.mark.parametrize("content", ["", "{}", "[]", "null", '{"secret": 5}', '{"secret": "short"}', "\x00" * 80])
def test_a_damaged_key_file_is_named_and_never_replaced(tmp_path: Path, content: str) -> None:
    file = tmp_path / "station.key"
    file.write_text(content)
    file.chmod(0o600)
    with pytest.raises(ConfigError, match=r"station\.key is damaged"):
        load_or_create(file)
    assert file.read_text() == content


def test_a_state_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file"):
        station_keys(tmp_path / "file" / "state")
    with pytest.raises(ConfigError, match="file"):
        make_or_open_state(tmp_path / "file" / "state")
    with pytest.raises(ConfigError, match="file"):
        Admission(tmp_path / "file").admit(new_key_pair().public, "kit")


def test_secrets_show_nowhere(admission: Admission, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    pair = new_key_pair()
    assert pair.secret not in f"{pair} {pair!r}"
    token = admission.create_token(pair, ENDPOINTS, 60.0)
    shown = f"{token} {token!r}" + caplog.text
    assert token.enrolment.secret not in shown
    assert pair.secret not in shown
    assert pair.secret not in base64.urlsafe_b64decode(token.text().split(".")[1] + "==").decode("latin1")


def test_pairs_and_fingerprints() -> None:
    pair = new_key_pair()
    assert pair_of_secret(pair.secret) == pair
    assert pair.fingerprint == fingerprint(pair.public)
    assert len(pair.fingerprint) == 16
    assert is_key(pair.public)
    for wrong in ("", "x" * 39, " " * 40, "é" * 40, None, 5, b"x" * 40, "#" * 40):
        assert not is_key(wrong)


def test_a_token_is_one_safe_word_that_reads_back(admission: Admission) -> None:
    server = new_key_pair()
    token = admission.create_token(server, ENDPOINTS, 60.0, uses=3)
    text = token.text()
    assert parse_token(f"  {text}\n") == token
    assert token.server_key == server.public
    assert token.endpoints == ENDPOINTS
    assert not token.is_expired()
    assert text.startswith("wdmoe1.")
    assert all(c.isalnum() or c in "-_." for c in text)


def test_damaged_tokens_are_refused_in_one_line(admission: Admission) -> None:
    text = admission.create_token(new_key_pair(), ENDPOINTS, 60.0).text()
    for wrong, why in (
        ("", "must start with wdmoe1."),
        ("tcp://1.2.3.4:5", "must start with wdmoe1."),
        ("wdmoe2." + text[7:], "another version"),
        (text[:-3], "checksum"),
        (text[:20] + ("A" if text[20] != "A" else "B") + text[21:], "checksum"),
        (text[:20] + " " + text[21:], "characters"),
        (text + "é", "characters"),
        ("wdmoe1.", "checksum"),
        ("wdmoe1." + "A" * 5000, "longer"),
    ):
        with pytest.raises(ConfigError, match=why) as caught:
            parse_token(wrong)
        assert text[20:60] not in str(caught.value), "a token is a secret"


def test_a_token_with_a_good_checksum_and_odd_content_is_refused() -> None:
    for content in (b"{}", b"[]", b"[" * 2900, b"null", b'{"e":5}', b'{"e":["tcp://a:1"],"s":"","k":"","t":"x"}'):
        checked = content + zlib.crc32(content).to_bytes(4, "big")
        with pytest.raises(ConfigError, match="content"):
            parse_token("wdmoe1." + base64.urlsafe_b64encode(checked).decode().rstrip("="))


@given(st.text(max_size=200))
def test_no_text_does_more_than_be_refused(text: str) -> None:
    for candidate in (text, "wdmoe1." + text):
        with pytest.raises(ConfigError):
            parse_token(candidate)


@pytest.mark.parametrize("endpoint", ["tcp://*:5555", "ipc:///tmp/x", "192.168.1.2:5555", "tcp://a\nb:1"])
def test_tokens_name_endpoints_that_a_device_can_dial(admission: Admission, endpoint: str) -> None:
    with pytest.raises(ConfigError, match="tcp://"):
        admission.create_token(new_key_pair(), [endpoint], 60.0)


@pytest.mark.parametrize(("ttl_s", "uses"), [(0.0, None), (-1.0, None), (float("nan"), None), (60.0, 0)])
def test_tokens_need_a_life_and_a_use(admission: Admission, ttl_s: float, uses: int | None) -> None:
    with pytest.raises(ConfigError, match="token"):
        admission.create_token(new_key_pair(), ENDPOINTS, ttl_s, uses)


def test_a_token_admits_as_many_devices_as_it_says(admission: Admission) -> None:
    enrolment = admission.create_token(new_key_pair(), ENDPOINTS, 60.0, uses=2).enrolment.public
    keys = [new_key_pair().public for _ in range(3)]
    assert admission.kind_of(enrolment) == "enrolment"
    admission.enrol(enrolment, keys[0], "one")
    admission.enrol(enrolment, keys[0], "one")  # the answer was lost: asked again, not counted again
    admission.enrol(enrolment, keys[1], "two")
    with pytest.raises(RefusedError, match="used up"):
        admission.enrol(enrolment, keys[2], "three")
    assert [admission.kind_of(key) for key in keys] == ["device", "device", "unknown"]
    assert admission.kind_of(enrolment) == "unknown"
    assert [device.name for device in admission.devices()] == ["one", "two"]


def test_a_token_expires(admission: Admission) -> None:
    token = admission.create_token(new_key_pair(), ENDPOINTS, 1.0)
    while not token.is_expired():
        time.sleep(0.05)
    assert admission.kind_of(token.enrolment.public) == "unknown"
    with pytest.raises(RefusedError, match="expired"):
        admission.enrol(token.enrolment.public, new_key_pair().public, "late")
    admission.create_token(new_key_pair(), ENDPOINTS, 60.0)
    assert admission.kind_of(token.enrolment.public) == "unknown"


def test_only_keys_are_enrolled(admission: Admission) -> None:
    token = admission.create_token(new_key_pair(), ENDPOINTS, 60.0)
    with pytest.raises(RefusedError, match="Z85"):
        admission.enrol(token.enrolment.public, "../../etc/passwd", "odd")
    with pytest.raises(ConfigError, match="Z85"):
        admission.admit("short", "odd")


def test_revoking_by_name_and_by_fingerprint(admission: Admission) -> None:
    one, two, three = (new_key_pair().public for _ in range(3))
    admission.admit(one, "kit")
    admission.admit(two, "kit")
    admission.admit(three, "other")
    assert {device.fingerprint for device in admission.revoke("kit")} == {fingerprint(one), fingerprint(two)}
    assert [device.fingerprint for device in admission.revoke(fingerprint(three)[:8])] == [fingerprint(three)]
    assert [admission.kind_of(key) for key in (one, two, three)] == ["revoked"] * 3
    for nobody in ("kit", "", fingerprint(three)[:7], fingerprint(three)[:8]):
        with pytest.raises(ConfigError, match="no admitted device"):
            admission.revoke(nobody)


def test_another_process_can_admit_and_revoke(admission: Admission, tmp_path: Path) -> None:
    key = new_key_pair().public
    assert admission.kind_of(key) == "unknown"
    other = Admission(tmp_path)
    other.admit(key, "kit")
    _until(lambda: admission.kind_of(key) == "device")
    Admission(tmp_path).revoke("kit")
    _until(lambda: admission.kind_of(key) == "revoked")


def test_files_that_are_no_entries_are_skipped_with_a_line(
    admission: Admission, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good, renamed = new_key_pair().public, new_key_pair().public
    admission.admit(good, "kit")
    devices = tmp_path / "devices"
    (devices / "a.json").write_text("{")
    (devices / "b.json").write_text("[" * 100_000)
    (devices / "c.json").write_text("[]")
    (devices / "d.json").write_text('{"key": "short"}')
    (devices / "e.json").write_text(json.dumps({"key": renamed, "name": "moved"}))
    (devices / "f.json").mkdir()
    (devices / "g.json").symlink_to("nowhere")
    assert [device.key for device in admission.devices()] == [good]
    assert admission.kind_of(renamed) == "unknown"
    for name in "abcdef":
        assert f"{name}.json" in caplog.text


def test_tokens_built_by_hand_are_checked_too() -> None:
    with pytest.raises(ConfigError, match="1 to 8 endpoints"):
        JoinToken(endpoints=(), server_key="", enrolment=new_key_pair(), expires_unix=0.0)


def _until(condition: object) -> None:
    assert callable(condition)
    limit = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.02)


def test_revoking_ends_the_tokens_that_the_board_may_hold(admission: Admission) -> None:
    token = admission.create_token(new_key_pair(), ["tcp://127.0.0.1:5555"], ttl_s=60)
    admission.enrol(token.enrolment.public, new_key_pair().public, "kit")
    admission.revoke("kit")
    assert admission.kind_of(token.enrolment.public) == "revoked"
    with pytest.raises(RefusedError, match="join token"):
        admission.enrol(token.enrolment.public, new_key_pair().public, "kit again")
