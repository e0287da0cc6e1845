"""The cache on real folders: bounded, checked, shared, and never in the way."""

from __future__ import annotations

import hashlib
import logging
import os
import resource
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.lab.full_disk import PAGE, fill, small_disk
from wdmoe.nodes.device.expert_cache import ExpertCache

KIB = 1024


def blob(number: int, size: int = KIB) -> tuple[str, bytes]:
    data = number.to_bytes(4, "little") * (size // 4)
    return hashlib.sha256(data).hexdigest(), data


def age(folder: Path, sha256: str, seconds: float) -> None:
    path = folder / f"{sha256}.onnx"
    os.utime(path, (path.stat().st_atime, path.stat().st_mtime - seconds))


def test_gives_back_what_was_put_also_to_the_next_process(tmp_path):
    sha256, data = blob(1)
    ExpertCache(tmp_path / "a" / "b", 4 * KIB).put(sha256, data)
    again = ExpertCache(tmp_path / "a" / "b", 4 * KIB)
    assert again.get(sha256) == data
    assert again.get(blob(2)[0]) is None
    assert (tmp_path / "a" / "b").stat().st_mode & 0o077 == 0


def test_the_least_recently_used_goes_and_what_is_in_use_stays(tmp_path):
    cache, blobs = ExpertCache(tmp_path, 3 * KIB), [blob(number) for number in range(4)]
    for seconds, (sha256, data) in zip((300, 200, 100), blobs[:3], strict=True):
        cache.put(sha256, data)
        age(tmp_path, sha256, seconds)
    assert cache.get(blobs[1][0]) is not None  # used just now
    cache.put(*blobs[3], keep={blobs[0][0]})
    assert [cache.get(sha256) is not None for sha256, _ in blobs] == [True, True, False, True]


def test_where_all_is_in_use_nothing_is_stored_and_nothing_is_lost(tmp_path):
    cache, (first, second) = ExpertCache(tmp_path, KIB), (blob(1), blob(2))
    cache.put(*first)
    cache.put(*second, keep={first[0]})
    assert cache.get(first[0]) == first[1]
    assert cache.get(second[0]) is None


@pytest.mark.parametrize("damage", [b"", b"short", None])
def test_a_damaged_file_is_removed_and_never_returned(tmp_path, damage, caplog):
    cache, (sha256, data) = ExpertCache(tmp_path, 4 * KIB), blob(1)
    cache.put(sha256, data)
    path = tmp_path / f"{sha256}.onnx"
    path.write_bytes(damage if damage is not None else data[:-1] + b"x")
    assert cache.get(sha256) is None
    assert not path.exists()
    assert "damaged" in caplog.text
    cache.put(sha256, data)
    assert cache.get(sha256) == data


@contextmanager
def disk_takes_only_2_kib_more():
    """A limit on the size of files: the only full disk that needs no root. Within the test alone, since it holds for
    what pytest itself writes, too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * KIB, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_said_once_and_lived_with(tmp_path, caplog):
    cache, (first, second) = ExpertCache(tmp_path, 64 * KIB), (blob(1), blob(2, 8 * KIB))
    with disk_takes_only_2_kib_more():
        cache.put(*first)
        cache.put(*second)
        cache.put(*blob(3, 8 * KIB))
    assert cache.get(first[0]) == first[1]
    assert cache.get(second[0]) is None
    assert [r.levelno for r in caplog.records] == [logging.WARNING]
    assert "can't be written: File too large; going on without it" in caplog.text
    assert [path.suffix for path in tmp_path.iterdir()] == [".onnx"]  # no half file stays


def test_a_disk_without_room_is_lived_with(tmp_path, caplog):
    with small_disk(tmp_path / "small") as disk:
        cache, (first, second) = ExpertCache(disk / "cache", 2048 * KIB), (blob(1), blob(2, 8 * KIB))
        cache.put(*first)
        filler = fill(disk, PAGE)
        cache.put(*second)  # half of it fits
        cache.put(*blob(3))
        filler.unlink()
        again = ExpertCache(disk / "cache", 2048 * KIB)
        assert again.get(first[0]) == first[1]
        assert again.get(second[0]) is None
        assert [path.name for path in (disk / "cache").iterdir()] == [f"{first[0]}.onnx"]
    assert [r.levelno for r in caplog.records] == [logging.WARNING]
    assert "can't be written: No space left on device; going on without it" in caplog.text


def test_a_disk_that_has_room_again_is_used_again(tmp_path, caplog, monkeypatch):
    """One write that failed ended the cache for as long as the process lived."""
    monkeypatch.setattr("wdmoe.nodes.device.expert_cache.PAUSE_S", 0.0)
    cache, (first, second) = ExpertCache(tmp_path, 64 * KIB), (blob(1, 8 * KIB), blob(2, 8 * KIB))
    with disk_takes_only_2_kib_more():
        cache.put(*first)
        cache.put(*second)
    cache.put(*first)
    assert cache.get(first[0]) == first[1]
    assert [r.levelno for r in caplog.records] == [logging.WARNING]
    with disk_takes_only_2_kib_more():
        cache.put(*second)
    assert len(caplog.records) == 2  # other trouble, so it is said


def test_a_folder_that_cannot_be_made_is_lived_without(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    cache = ExpertCache(tmp_path / "file" / "cache", KIB)
    cache.put(*blob(1))
    assert cache.get(blob(1)[0]) is None
    assert "can't be written" in caplog.text


WRITER = """
import hashlib, sys
from pathlib import Path
from tests.lab.full_disk import PAGE, fill, small_disk
from wdmoe.nodes.device.expert_cache import ExpertCache
cache = ExpertCache(Path(sys.argv[1]), 20_000)
for round in range(20):
    for number in range(10):
        data = bytes([number]) * 3000
        sha256 = hashlib.sha256(data).hexdigest()
        if cache.get(sha256) is None:
            cache.put(sha256, data)
"""


def test_several_processes_share_a_folder(tmp_path):
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, tmp_path], stderr=subprocess.PIPE, text=True) for _ in range(3)
    ]
    said = [writer.communicate()[1] for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0, 0], said
    assert said == ["", "", ""]  # no warning: nobody saw a damaged file or lost the folder
    left = list(tmp_path.iterdir())
    assert left
    assert all(hashlib.sha256(path.read_bytes()).hexdigest() == path.stem for path in left)
