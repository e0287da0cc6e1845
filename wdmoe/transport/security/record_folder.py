"""A folder of small JSON files, one a key. What was read once holds until a record says otherwise.

A file that cannot be read is no statement: not by a process that has no descriptor left, not while somebody moves the
folder, not half-written. So an entry that is known stays as it was, and that is said once, not at every look.
"""

from __future__ import annotations

import json
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from wdmoe.errors import ConfigError
from wdmoe.transport.security.keys import fingerprint, is_key, write_private_json

_LOG = logging.getLogger(__name__)
_COARSE_CLOCK_NS = 50_000_000  # file times move in steps: what is this fresh may change again unseen
_MOST_FILE_BYTES = 4096
_SUFFIX = ".json"
_GONE = "it is gone"

Record: TypeAlias = Mapping[str, Any]
Stamp: TypeAlias = "tuple[int, int, int]"  # inode, size, time of change


class _NoRecordError(Exception):
    """The content is not what a record holds."""


class RecordFolder:
    """Records by key, as they were read last. Thread-safe. Makes nothing until `write`."""

    def __init__(self, path: Path, ended: Callable[[Record], bool]) -> None:
        """`ended`: whether something positive says that this record, whose file is gone, counts no more."""
        self.path = path
        self.unread = 0  # faults found so far
        self._ended = ended
        self._lock = threading.Lock()
        self._settled_ns = -1  # time of change of a folder that was read whole
        self._checked_at = -math.inf
        self._known: dict[str, Record] = {}  # by file name
        self._stamps: dict[str, Stamp] = {}  # of the files that were read, damaged ones too
        self._faults: dict[str, str] = {}  # by file name, "" for the folder: what is wrong now, and was said
        self._entries: Mapping[str, Record] = {}

    @property
    def faults(self) -> int:
        """Files that cannot be read now, or are gone. A folder that cannot be read counts as one."""
        return len(self._faults)

    def entries(self, max_age_s: float = 0.0) -> Mapping[str, Record]:
        """Content by key, looked at no longer than `max_age_s` ago."""
        if time.monotonic() - self._checked_at < max_age_s:
            return self._entries
        with self._lock:
            self._refresh()
            return self._entries

    def write(self, key: str, content: Record) -> None:
        """Write one record; it counts from here on.

        Raises:
            ConfigError: it cannot be written. What counted before still does.
        """
        record, name = {"key": key, **content}, f"{fingerprint(key)}{_SUFFIX}"
        with self._lock:
            try:
                write_private_json(self.path / name, record)
            except OSError as error:
                raise ConfigError(f"state folder {self.path}: {error.strerror or error}") from error
            self._known[name] = record
            self._look_again(name)

    def delete(self, key: str) -> None:
        """Delete one record; it counts no more from here on.

        Raises:
            ConfigError: the file cannot be deleted.
        """
        name = f"{fingerprint(key)}{_SUFFIX}"
        with self._lock:
            try:
                (self.path / name).unlink(missing_ok=True)
            except OSError as error:
                raise ConfigError(f"state folder {self.path}: {error.strerror or error}") from error
            self._known.pop(name, None)
            self._look_again(name)

    def _look_again(self, name: str) -> None:
        self._stamps.pop(name, None)
        self._settled_ns, self._checked_at = -1, -math.inf
        self._publish()

    def _publish(self) -> None:
        self._entries = {record["key"]: record for record in self._known.values()}

    # ---- reading

    def _refresh(self) -> None:
        self._checked_at = time.monotonic()
        try:
            changed_ns = self.path.stat().st_mtime_ns
            if changed_ns == self._settled_ns:
                return
            with os.scandir(self.path) as found:
                names = sorted(each.name for each in found if each.name.endswith(_SUFFIX))
        except OSError as error:
            self._settled_ns = -1
            self._tell({"": error.strerror or str(error)})
            return
        faults = {name: fault for name in names if (fault := self._read(name))}
        fresh = time.time_ns() - changed_ns < _COARSE_CLOCK_NS
        self._settled_ns = -1 if faults or fresh else changed_ns
        self._tell(faults | self._missing(names))
        self._publish()

    def _read(self, name: str) -> str:
        """Take in one file. Returns what is wrong with it: then the known record stays."""
        path = self.path / name
        try:
            stat = path.stat()
            stamp = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
            if self._stamps.get(name) == stamp:
                return self._faults.get(name, "")
            record = _record_of(path)
        except FileNotFoundError:  # deleted since the folder was listed
            return ""
        except OSError as error:  # says nothing about the file
            self._stamps.pop(name, None)
            return error.strerror or str(error)
        except _NoRecordError as error:
            self._stamps[name] = stamp
            return str(error)
        self._known[name] = record
        if time.time_ns() - stat.st_mtime_ns > _COARSE_CLOCK_NS:
            self._stamps[name] = stamp
        return ""

    def _missing(self, names: list[str]) -> dict[str, str]:
        gone = self._known.keys() - set(names)
        for name in [name for name in gone if self._ended(self._known[name])]:
            del self._known[name]
        for name in gone:
            self._stamps.pop(name, None)
        return dict.fromkeys(gone & self._known.keys(), _GONE)

    def _tell(self, faults: dict[str, str]) -> None:
        """Log what is wrong and was not before, and what is well again."""
        for name, fault in faults.items():
            if self._faults.get(name) != fault:
                self.unread += 1
                _LOG.warning("%s", self._line(name, fault))
        if "" not in faults:
            for name in self._faults.keys() - faults.keys():
                _LOG.warning("%s is as it should be again", self.path / name)
            self._faults = faults
        else:
            self._faults |= faults

    def _line(self, name: str, fault: str) -> str:
        where = self.path / name
        if fault == _GONE:
            return f"{where}: {fault}. That revokes nothing: run wdmoe-node token revoke, or move the file to revoked/"
        if name and name not in self._known:
            return f"skipped {where}: {fault}"
        return f"{where} cannot be read ({fault}): what was known before still holds"


def _record_of(path: Path) -> Record:
    with path.open("rb") as opened:
        raw = opened.read(_MOST_FILE_BYTES + 1)
    try:
        record = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise _NoRecordError(f"it is no JSON: {error}") from None
    if not isinstance(record, dict) or not is_key(record.get("key")):
        raise _NoRecordError("it needs a 'key' of 40 Z85 characters")
    if path.stem != fingerprint(record["key"]):
        raise _NoRecordError(f"its key belongs in {fingerprint(record['key'])}{_SUFFIX}")
    return record
