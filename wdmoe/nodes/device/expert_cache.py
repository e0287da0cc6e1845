"""Expert files on disk, named by their SHA-256. Losing the cache costs a download, never an answer."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import os
import tempfile
import time
from collections.abc import Collection
from pathlib import Path

log = logging.getLogger(__name__)

SUFFIX = ".onnx"
PARTIAL = ".part"
PAUSE_S = 60.0  # after a write that failed, before the disk is tried again
UNSEEN = 64  # part of the room that one process fills without looking what others did
STALE_S = 3600.0  # a half-written file this old belongs to a process that is gone


class ExpertCache:
    """A folder of expert files, bounded in bytes; the least recently used go first.

    Several processes may share the folder: files appear whole (written elsewhere, then renamed), are never
    changed and are checked whenever they are read. So no write waits for the disk: what a power cut damages
    is fetched again. Trouble with the disk is logged once and lived with until it passes. Methods block; call
    them from a worker thread.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self._folder = folder
        self._limit_bytes = limit_bytes
        self._rests_until_s = -math.inf
        self._failed = False  # the last write, and that was said
        self._unseen_bytes = 0  # may be written before the folder is looked through again
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._remove_leftovers()
        except OSError as error:
            self._give_up(error)

    def get(self, sha256: str) -> bytes | None:
        """The file with this hash (in hex), verified, or None. One that doesn't match is removed."""
        path = self._path(sha256)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            log.warning("expert cache: cannot read %s: %s", path, error)
            return None
        if hashlib.sha256(data).hexdigest() != sha256:
            log.warning("expert cache: removed %s, which is damaged; fetching it again", path)
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # the file system may not keep access times: the time of change marks the last use
        return data

    def put(self, sha256: str, data: bytes, keep: Collection[str] = ()) -> None:
        """Store a verified file and evict others for it. `keep` are hashes in use, which stay."""
        if time.monotonic() < self._rests_until_s:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if self._make_room(len(data), {*keep, sha256}):
                self._write(self._path(sha256), data)
                self._failed = False
        except OSError as error:
            self._give_up(error)

    def _path(self, sha256: str) -> Path:
        return self._folder / (sha256 + SUFFIX)

    def _make_room(self, size: int, keep: set[str]) -> bool:
        """Evict until `size` more bytes fit. False where what is in use leaves no room."""
        if size <= self._unseen_bytes:
            self._unseen_bytes -= size
            return True
        entries = sorted(self._entries())
        used = sum(length for _, length, _ in entries)
        for _, length, path in entries:
            if used + size <= self._limit_bytes:
                break
            if path.stem not in keep:
                path.unlink(missing_ok=True)
                used -= length
        # Others may write as much. Looking each time would cost a stat for every file that there is.
        self._unseen_bytes = max(0, self._limit_bytes - used - size) // UNSEEN
        return used + size <= self._limit_bytes

    def _entries(self) -> list[tuple[float, int, Path]]:
        """(last use, bytes, path) of every file that another process doesn't remove meanwhile."""
        found = []
        for path in self._folder.glob("*" + SUFFIX):
            with contextlib.suppress(FileNotFoundError):
                stat = path.stat()
                found.append((stat.st_mtime, stat.st_size, path))
        return found

    def _write(self, path: Path, data: bytes) -> None:
        handle, name = tempfile.mkstemp(suffix=PARTIAL, dir=self._folder)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            Path(name).replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                Path(name).unlink()
            raise

    def _remove_leftovers(self) -> None:
        for path in self._folder.glob("*" + PARTIAL):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > STALE_S:
                    path.unlink()

    def _give_up(self, error: OSError) -> None:
        self._rests_until_s = time.monotonic() + PAUSE_S
        if self._failed:
            return
        self._failed = True
        log.warning(
            "expert cache %s can't be written: %s; going on without it",
            self._folder,
            error.strerror or error,
        )
