"""The files of a half-finished export: written whole or not at all, hashed as they are written, found again
later.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from wdmoe.errors import BundleError

JOURNAL_NAME = ".export.jsonl"
_HASH_STEP = 4 << 20


class Journal:
    """Writes an export's files and remembers which are done, so that an interrupted export can go on.

    The first line names the work (source and settings); each other line is a finished file. A file counts as
    done only if its bytes still have the hash that was written down. A context manager: leaving it lets go of the
    folder, whatever has happened.
    """

    def __init__(self, folder: Path, identity: str) -> None:
        """Start or resume.

        Raises:
            BundleError: the folder holds a bundle, another export, something else, or is in use.
        """
        self._folder = folder
        self._path = folder / JOURNAL_NAME
        self._done: dict[str, dict[str, Any]] = {}
        with _disk(folder):
            folder.mkdir(parents=True, exist_ok=True)
            if self._path.exists():
                self._done = self._resume(identity)
            elif any(folder.iterdir()):
                raise BundleError(f"{folder} is not empty: give a new folder, or delete it first")
            else:
                self._path.write_text(json.dumps({"identity": identity}) + "\n")
            self._lock()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *error: object) -> None:
        with suppress(OSError):  # a line that found no room was told of by `write`, and would be tried again here
            self._stream.close()

    def _lock(self) -> None:
        """One export at a time: the lock goes when the stream is closed or the process ends."""
        torn = not self._path.read_bytes().endswith(b"\n")  # by an end of the process in mid-line
        self._stream = self._path.open("a")
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._stream.close()
            raise BundleError(f"{self._folder} is being written by another export") from None
        if torn:
            self._stream.write("\n")

    def _resume(self, identity: str) -> dict[str, dict[str, Any]]:
        lines = self._path.read_text(errors="replace").splitlines()
        entries = [entry for line in lines if (entry := _entry(line)) is not None]
        if entries and entries[0].get("identity") != identity:
            raise BundleError(f"{self._folder} holds a half-finished export of something else: delete it first")
        if not entries:
            self._path.write_text(json.dumps({"identity": identity}) + "\n")
        return {entry["path"]: entry for entry in entries[1:] if "path" in entry and "sha256" in entry}

    def finished(self, name: str) -> dict[str, Any] | None:
        """What was written down about a file, if its bytes are still the same (they are hashed again)."""
        entry = self._done.get(name)
        if entry is None:
            return None
        try:
            with (self._folder / name).open("rb") as stream:
                digest = hashlib.sha256()
                while part := stream.read(_HASH_STEP):
                    digest.update(part)
        except OSError:
            return None
        return entry if digest.hexdigest() == entry["sha256"] else None

    def write(self, name: str, parts: Iterable[bytes | memoryview], **about: Any) -> dict[str, Any]:
        """Write a file and put it down as finished: path, sha256, size and `about`.

        An interrupt leaves no partial file under the final name.

        Raises:
            BundleError: the disk is full or cannot be written.
        """
        path = self._folder / name
        partial = path.with_name(path.name + ".part")
        digest, size = hashlib.sha256(), 0
        with _disk(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with partial.open("wb") as stream:
                    for part in parts:
                        stream.write(part)
                        digest.update(part)
                        size += len(part)
                os.replace(partial, path)
            finally:
                partial.unlink(missing_ok=True)
            entry = {"path": name, "sha256": digest.hexdigest(), "size": size, **about}
            self._stream.write(json.dumps(entry) + "\n")
            self._stream.flush()
        return entry

    def close(self, manifest_name: str, manifest: bytes) -> None:
        """Write the manifest, which makes the folder a bundle, and remove the journal."""
        self.write(manifest_name, [manifest])
        with _disk(self._path):
            self._path.unlink()


def _entry(line: str) -> dict[str, Any] | None:
    try:
        plain = json.loads(line)
    except ValueError:  # the line being written when the power went
        return None
    return plain if isinstance(plain, dict) else None


@contextmanager
def _disk(path: Path) -> Iterator[None]:
    """Turns the failures of a disk into one line."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise BundleError(
                f"the disk is full at {path}: make room and run the same command again to go on"
            ) from error
        raise BundleError(f"cannot write {path}: {error.strerror or error}") from error
