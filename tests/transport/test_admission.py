"""The allow list on a disk in trouble: what cannot be read changes nothing, what was revoked stays revoked."""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.lab.full_disk import PAGE, fill, small_disk
from tests.lab.waiting import PATIENCE_S
from wdmoe.errors import ConfigError, RefusedError
from wdmoe.transport.security.admission import Admission
from wdmoe.transport.security.keys import fingerprint, load_or_create, new_key_pair
from wdmoe.transport.security.station_state import make_or_open_state, open_state

ENDPOINTS = ("tcp://127.0.0.1:5555",)
LOOKS_S = 0.4  # several looks at the folders
NOBODY = 65534


@pytest.fixture
def admission(tmp_path: Path) -> Admission:
    return make_or_open_state(tmp_path / "bs").admission


def file_of(admission: Admission, key: str, folder: str = "devices") -> Path:
    return admission.state / folder / f"{fingerprint(key)}.json"


@contextmanager
def moved(path: Path) -> Iterator[None]:
    aside = path.with_name("aside")
    path.rename(aside)
    try:
        yield
    finally:
        aside.rename(path)


@contextmanager
def replaced(path: Path, put: Callable[[Path], object]) -> Iterator[None]:
    """Something else in its place."""
    with moved(path):
        put(path)
        try:
            yield
        finally:
            remove = path.unlink if path.is_symlink() or path.is_file() else path.rmdir
            remove()


@contextmanager
def rewritten(path: Path, content: bytes) -> Iterator[None]:
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(before)


@contextmanager
def no_descriptors_left() -> Iterator[None]:
    """As a thousand raw TCP connections leave it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    taken = []
    try:
        while True:
            taken.append(os.open(os.devnull, os.O_RDONLY))
    except OSError:
        yield
    finally:
        for descriptor in taken:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextmanager
def no_permission(folder: Path) -> Iterator[None]:
    """Root may read all: it becomes somebody else meanwhile."""
    folder.chmod(0)
    if os.geteuid() == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if os.getuid() == 0:
            os.seteuid(0)
        folder.chmod(0o700)


def loop_to(path: Path) -> None:
    path.symlink_to(path.name)


TROUBLES = {
    "folder moved": lambda state, file: moved(state / "devices"),
    "folder is a file": lambda state, file: replaced(state / "devices", Path.touch),
    "folder is a loop": lambda state, file: replaced(state / "devices", loop_to),
    "folder forbidden": lambda state, file: no_permission(state / "devices"),
    "all forbidden": lambda state, file: no_permission(state),
    "file moved": lambda state, file: moved(file),
    "file is a folder": lambda state, file: replaced(file, Path.mkdir),
    "file empty": lambda state, file: rewritten(file, b""),
    "file truncated": lambda state, file: rewritten(file, file.read_bytes()[:30]),
    "file is no JSON": lambda state, file: rewritten(file, b"\xff{" * 900),
    "file of another": lambda state, file: rewritten(file, b'{"key": "short"}'),
    "no descriptors": lambda state, file: no_descriptors_left(),
    "revoked/ moved": lambda state, file: moved(state / "revoked"),
    "revoked/ is a file": lambda state, file: replaced(state / "revoked", Path.touch),
    "revoked/ forbidden": lambda state, file: no_permission(state / "revoked"),
}


@pytest.mark.parametrize("trouble", TROUBLES)
def test_what_cannot_be_read_is_as_before_and_said_once(
    admission: Admission, trouble: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A list that could not be read admitted nobody: every device was told that it was revoked, and ended for good."""
    key, thief = new_key_pair().public, new_key_pair().public
    admission.admit(key, "kit")
    admission.admit(thief, "thief")
    admission.revoke("thief")
    assert (admission.kind_of(key), admission.kind_of(thief)) == ("device", "revoked")
    _settle()
    caplog.clear()
    with TROUBLES[trouble](admission.state, file_of(admission, key)):
        if "descriptors" in trouble:
            os.utime(admission.state / "devices")  # as any change to the list does: it has to be read again
        kinds = {(admission.kind_of(key), admission.kind_of(thief)) for _ in _looks()}
        faults = admission.faults
    assert {kind for kind, _ in kinds} == {"device"}
    assert {kind for _, kind in kinds} <= {"revoked", "unknown"}  # out it stays, whatever is the reason
    assert faults >= 1
    assert admission.unread >= 1
    warned = [r for r in caplog.records if r.levelno == logging.WARNING and "again" not in r.message]
    assert 1 <= len(warned) <= 3, [r.message for r in warned]  # of each folder at most once, not ten times a second
    assert {(admission.kind_of(key), admission.kind_of(thief)) for _ in _looks()} == {("device", "revoked")}
    assert admission.faults == 0
    Admission(admission.state).revoke("kit")
    _until(lambda: admission.kind_of(key) == "revoked")


@pytest.mark.parametrize("trouble", ["no descriptors", "folder moved", "file moved", "folder is a loop"])
def test_a_revocation_is_heeded_whatever_the_list_is_like(admission: Admission, trouble: str) -> None:
    key, other = new_key_pair().public, new_key_pair().public
    admission.admit(key, "kit")
    admission.admit(other, "other")
    with TROUBLES[trouble](admission.state, file_of(admission, key)):
        assert admission.kind_of(key) == admission.kind_of(other) == "device"
        file_of(admission, key, "revoked").symlink_to("nothing")  # needs no descriptor, and the name says all
        _until(lambda: admission.kind_of(key) == "revoked")
        assert admission.kind_of(other) == "device"
    assert admission.kind_of(key) == "revoked"
    assert Admission(admission.state).kind_of(key) == "revoked"


def test_a_file_that_is_moved_revokes_and_moved_back_admits(admission: Admission) -> None:
    key = new_key_pair().public
    admission.admit(key, "kit")
    file_of(admission, key).rename(file_of(admission, key, "revoked"))
    _until(lambda: admission.kind_of(key) == "revoked")
    assert not admission.devices()
    file_of(admission, key, "revoked").rename(file_of(admission, key))
    _until(lambda: admission.kind_of(key) == "device")
    assert [device.name for device in admission.devices()] == ["kit"]


def test_a_file_that_is_deleted_revokes_nothing_until_the_next_start(
    admission: Admission, caplog: pytest.LogCaptureFixture
) -> None:
    key = new_key_pair().public
    admission.admit(key, "kit")
    assert admission.kind_of(key) == "device"
    file_of(admission, key).unlink()
    assert {admission.kind_of(key) for _ in _looks()} == {"device"}
    assert caplog.text.count("it is gone. That revokes nothing") == 1
    assert Admission(admission.state).kind_of(key) == "unknown"
    # The command knows it no more by name, but by its fingerprint.
    with pytest.raises(ConfigError, match="no admitted device"):
        Admission(admission.state).revoke("kit")
    Admission(admission.state).revoke(fingerprint(key))
    _until(lambda: admission.kind_of(key) == "revoked")


@pytest.mark.parametrize("trouble", ["revoked/ moved", "revoked/ is a file"])
def test_who_was_never_seen_stays_out_while_it_cannot_be_told(admission: Admission, trouble: str) -> None:
    key, newcomer = new_key_pair().public, new_key_pair().public
    admission.admit(key, "kit")
    token = admission.create_token(new_key_pair(), ENDPOINTS, 60.0, uses=1).enrolment.public
    started = Admission(admission.state)
    with TROUBLES[trouble](admission.state, file_of(admission, key)):
        assert started.kind_of(key) == "unknown"
        assert started.faults == 1
        with pytest.raises(ConfigError, match="revoked"):
            started.enrol(token, newcomer, "newcomer")
    _until(lambda: started.kind_of(key) == "device")
    assert started.enrol(token, newcomer, "newcomer").name == "newcomer"


def test_a_revoked_device_is_admitted_again_by_a_new_token_and_never_by_an_old_one(admission: Admission) -> None:
    key = new_key_pair().public
    old = admission.create_token(new_key_pair(), ENDPOINTS, 60.0).enrolment.public
    admission.enrol(old, key, "kit")
    Admission(admission.state).revoke("kit")
    with pytest.raises(RefusedError, match="unknown, expired or used up"):
        admission.enrol(old, key, "kit")
    assert admission.kind_of(key) == "revoked"
    new = Admission(admission.state).create_token(new_key_pair(), ENDPOINTS, 60.0, uses=1).enrolment.public
    admission.enrol(new, key, "kit")
    assert admission.kind_of(key) == Admission(admission.state).kind_of(key) == "device"
    assert admission.kind_of(new) == "unknown", "its use was counted"


def test_a_token_that_is_revoked_while_it_is_used_admits_nobody(
    admission: Admission, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = admission.create_token(new_key_pair(), ENDPOINTS, 60.0).enrolment.public
    key, other = new_key_pair().public, new_key_pair().public
    admission.admit(other, "other")
    admit = admission.admit

    def meanwhile(key: str, name: str) -> object:
        Admission(admission.state).revoke("other")
        return admit(key, name)

    monkeypatch.setattr(admission, "admit", meanwhile)
    with pytest.raises(RefusedError, match="revoked just now"):
        admission.enrol(token, key, "kit")
    assert admission.kind_of(key) == Admission(admission.state).kind_of(key) == "revoked"


def test_tokens_deleted_by_hand_serve_on_and_revoked_ones_do_not(admission: Admission) -> None:
    deleted, ended = (admission.create_token(new_key_pair(), ENDPOINTS, 60.0).enrolment.public for _ in range(2))
    assert admission.kind_of(deleted) == admission.kind_of(ended) == "enrolment"
    file_of(admission, deleted, "tokens").unlink()
    file_of(admission, ended, "tokens").rename(file_of(admission, ended, "revoked"))
    _until(lambda: admission.kind_of(ended) == "revoked")
    assert {admission.kind_of(deleted) for _ in _looks()} == {"enrolment"}


def test_a_full_disk_admits_nobody_by_halves(tmp_path: Path) -> None:
    with small_disk(tmp_path / "small") as disk:
        admission = make_or_open_state(disk / "bs").admission
        token = admission.create_token(new_key_pair(), ENDPOINTS, 60.0, uses=2).enrolment.public
        key, known = new_key_pair().public, new_key_pair().public
        admission.admit(known, "known")
        for free, admitted in ((0, 1), (PAGE, 2)):  # room for nobody, then for one device
            filler = fill(disk, free)
            for _ in range(3):
                with contextlib.suppress(ConfigError):
                    admission.enrol(token, new_key_pair().public, "kit")
            with pytest.raises(ConfigError, match="No space left on device"):
                admission.enrol(token, new_key_pair().public, "kit")
            filler.unlink()
            assert not list(disk.rglob(".new-*"))
            listed = Admission(admission.state)
            assert len(listed.devices()) == len(admission.devices()) == admitted
            assert listed.tokens()[0].uses_left == 3 - admitted  # as many as were used, however often it failed
        filler = fill(disk)
        admission.revoke("known")  # takes a name, no room
        filler.unlink()
        again = Admission(admission.state)
        assert again.kind_of(known) == "revoked"
        assert again.kind_of(key) == "unknown"


def test_uses_are_not_lost_when_a_device_cannot_be_written(admission: Admission) -> None:
    token = admission.create_token(new_key_pair(), ENDPOINTS, 60.0, uses=1).enrolment.public
    with moved(admission.state / "devices"):
        for _ in range(3):
            with pytest.raises(ConfigError, match="devices"):
                admission.enrol(token, new_key_pair().public, "kit")
        assert not (admission.state / "devices").exists(), "an empty list in its place could not be moved away again"
    admission.enrol(token, new_key_pair().public, "kit")
    with pytest.raises(RefusedError, match="used up"):
        admission.enrol(token, new_key_pair().public, "one too many")


@pytest.mark.parametrize("step_s", [3600.0, -3600.0, -1e9])
def test_a_step_of_the_clock_ends_no_token_and_revives_none(
    admission: Admission, monkeypatch: pytest.MonkeyPatch, step_s: float
) -> None:
    live = admission.create_token(new_key_pair(), ENDPOINTS, 600.0).enrolment.public
    short = admission.create_token(new_key_pair(), ENDPOINTS, 1.1).enrolment.public
    assert admission.kind_of(live) == admission.kind_of(short) == "enrolment"
    true_time = time.time
    monkeypatch.setattr("time.time", lambda: true_time() + step_s)
    assert admission.kind_of(live) == "enrolment"
    assert 590 < admission.life_left_s(live) <= 600
    _until(lambda: admission.kind_of(short) == "unknown")


def test_a_clock_that_was_never_set_lengthens_no_life(admission: Admission, monkeypatch: pytest.MonkeyPatch) -> None:
    token = admission.create_token(new_key_pair(), ENDPOINTS, 600.0).enrolment.public
    monkeypatch.setattr("time.time", lambda: 0.0)  # 1970: a board without a battery
    started = Admission(admission.state)
    assert 590 < started.life_left_s(token) <= 600


# ---- state folders


def test_looking_makes_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no state folder .* station\.key"):
        open_state(tmp_path / "typo")
    admission = Admission(tmp_path / "typo")
    assert admission.kind_of(new_key_pair().public) == "unknown"
    assert not admission.devices()
    assert not (tmp_path / "typo").exists()


def test_a_list_that_was_moved_away_is_not_begun_anew(tmp_path: Path) -> None:
    """A station that started in that moment made an empty list, and knew none of its devices."""
    state = make_or_open_state(tmp_path / "bs")
    state.admission.admit(new_key_pair().public, "kit")
    for folder in ("devices", "tokens"):
        with moved(tmp_path / "bs" / folder):
            for opens in (make_or_open_state, open_state):
                with pytest.raises(ConfigError, match=f"{folder}: No such file"):
                    opens(tmp_path / "bs")
    with moved(tmp_path / "bs" / "station.key"), pytest.raises(ConfigError, match=r"lists devices but has no station"):
        make_or_open_state(tmp_path / "bs")
    assert make_or_open_state(tmp_path / "bs").keys == state.keys


def test_a_key_is_not_made_where_it_cannot_be_read(tmp_path: Path) -> None:
    pair = load_or_create(tmp_path / "station.key")
    with no_descriptors_left(), pytest.raises(ConfigError, match="Too many open files"):
        load_or_create(tmp_path / "station.key")
    assert load_or_create(tmp_path / "station.key") == pair


def test_a_process_that_dies_while_it_writes_leaves_the_old_record_or_the_new_one(admission: Admission) -> None:
    key = new_key_pair().public
    code = f"""if True:
        import itertools, pathlib
        from wdmoe.transport.security.admission import Admission
        admission = Admission(pathlib.Path({str(admission.state)!r}))
        for number in itertools.count():
            admission.admit({key!r}, "kit" * (number % 50))
    """
    for _ in range(5):
        with subprocess.Popen([sys.executable, "-c", code]) as writer:
            _until(lambda: admission.kind_of(key) == "device")
            time.sleep(0.05)
            writer.kill()
        fresh = Admission(admission.state)
        assert fresh.kind_of(key) == "device"
        assert fresh.faults == 0


def _settle() -> None:
    """Until the folders are older than the steps of a file system's clock."""
    time.sleep(0.1)


def _looks() -> Iterator[int]:
    until_s = time.monotonic() + LOOKS_S
    while time.monotonic() < until_s:
        yield 1
        time.sleep(0.02)


def _until(condition: Callable[[], bool]) -> None:
    limit_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < limit_s
        time.sleep(0.02)
