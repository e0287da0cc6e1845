"""Who is shut out: a folder with a file per revoked key, `STATE/revoked/<fingerprint>.json`.

The name alone counts. So nothing has to be opened or read to heed a revocation, which a process without descriptors or
a disk without room could not do, and an operator can revoke by moving a file here.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from wdmoe.errors import ConfigError
from wdmoe.transport.security.keys import sync_folder, write_private_json

_LOG = logging.getLogger(__name__)
_SUFFIX = ".json"
_MOST_FILE_BYTES = 4096


class Revocations:
    """Looks at most into the folder, never into a file. Thread-safe: each look is one call to the system."""

    def __init__(self, path: Path) -> None:
        """Makes nothing until `add`."""
        self.path = path
        self.unread = 0  # faults found so far
        self._known: dict[str, bool] = {}  # as seen last, of those that were asked for with `holds`
        self._fault = ""

    @property
    def faults(self) -> int:
        """1 while the folder cannot be looked at."""
        return int(bool(self._fault))

    def holds(self, fingerprint: str) -> bool | None:
        """Whether this key is shut out. Where the folder cannot be looked at, what was seen before still holds.

        Returns:
            None: it cannot be told, and never could. Then nobody should be let in.
        """
        found = self.look(fingerprint)
        if found is not None:
            self._known[fingerprint] = found
        return self._known.get(fingerprint)

    def look(self, fingerprint: str) -> bool | None:
        """As `holds`, of the folder as it is now and without remembering: for keys that anybody can make up."""
        try:
            os.lstat(self.path / f"{fingerprint}{_SUFFIX}")
        except FileNotFoundError:
            found = False
        except OSError as error:
            self._tell(error)
            return None
        else:
            found = True
        if not found:  # the file is not there: a statement only where the folder is
            try:
                os.stat(self.path)
            except OSError as error:
                self._tell(error)
                return None
        if self._fault:
            self._fault = ""
            _LOG.warning("%s can be looked at again", self.path)
        return found

    def add(self, fingerprint: str, content: Mapping[str, Any]) -> None:
        """Shut a key out from here on.

        Raises:
            ConfigError: the folder cannot be written.
        """
        file = self.path / f"{fingerprint}{_SUFFIX}"
        try:
            try:
                write_private_json(file, dict(content))
            except OSError:  # a full disk mostly has room for a name
                file.touch(mode=0o600)
                sync_folder(self.path)
        except OSError as error:
            raise ConfigError(f"state folder {self.path}: {error.strerror or error}") from error
        self._known[fingerprint] = True

    def remove(self, fingerprint: str) -> None:
        """Shut it out no more.

        Raises:
            ConfigError: the folder cannot be written.
        """
        try:
            (self.path / f"{fingerprint}{_SUFFIX}").unlink(missing_ok=True)
            sync_folder(self.path)
        except OSError as error:
            raise ConfigError(f"state folder {self.path}: {error.strerror or error}") from error
        self._known[fingerprint] = False

    def records(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """(fingerprint, content) of each file, in order; content is empty where it cannot be read.

        Raises:
            ConfigError: the folder cannot be listed.
        """
        try:
            files = sorted(self.path.glob(f"*{_SUFFIX}")) if self.path.is_dir() else []
        except OSError as error:
            raise ConfigError(f"state folder {self.path}: {error.strerror or error}") from error
        for file in files:
            yield file.stem, _content(file)

    def _tell(self, error: OSError) -> None:
        fault = error.strerror or str(error)
        if fault != self._fault:
            self._fault = fault
            self.unread += 1
            _LOG.warning("%s cannot be looked at (%s): who was in stays in, who was out stays out", self.path, fault)


def _content(file: Path) -> Mapping[str, Any]:
    try:
        with file.open("rb") as opened:
            content = json.loads(opened.read(_MOST_FILE_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}  # the name alone counts
    return content if isinstance(content, dict) else {}
