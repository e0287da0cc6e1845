"""Who may connect: a folder with a small file per admitted device and one per live join token.

    STATE/devices/<fingerprint>.json    {"key", "name", "admitted_unix"}
    STATE/tokens/<fingerprint>.json     {"key", "expires_unix", "uses_left"}

Both are read again when the folder changes, so another process (`wdmoe-node token`, or just rm) can admit and
revoke while the base station runs.
"""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from wdmoe.errors import ConfigError, RefusedError
from wdmoe.transport.security.join_tokens import JoinToken
from wdmoe.transport.security.keys import KeyPair, fingerprint, is_key, new_key_pair, write_private_json

_LOG = logging.getLogger(__name__)
_CHECK_INTERVAL_S = 0.2  # a revoked device is cut off after this long
_COARSE_CLOCK_NS = 50_000_000  # file times move in steps: a folder this fresh may change again unseen
_MOST_FILE_BYTES = 4096

Kind: TypeAlias = Literal["device", "enrolment", "unknown"]


@dataclass(frozen=True, slots=True)
class AdmittedDevice:
    """One entry of the allow list."""

    key: str
    name: str
    admitted_unix: float

    @property
    def fingerprint(self) -> str:
        """Its name in logs, and of its file."""
        return fingerprint(self.key)


class _KeyFolder:
    """A folder of JSON files that each describe one key. Thread-safe; what is unreadable is skipped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._seen_ns = -1
        self._checked_at = -math.inf
        self._entries: Mapping[str, dict[str, Any]] = {}
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"state folder {path}: {error.strerror or error}") from error

    def entries(self, max_age_s: float = 0.0) -> Mapping[str, dict[str, Any]]:
        """Content by key, at most `max_age_s` old."""
        if time.monotonic() - self._checked_at < max_age_s:
            return self._entries
        with self._lock:
            self._refresh()
            return self._entries

    def _refresh(self) -> None:
        self._checked_at = time.monotonic()
        try:
            changed_ns = self.path.stat().st_mtime_ns
            if changed_ns == self._seen_ns:
                return
            self._seen_ns = changed_ns if time.time_ns() - changed_ns > _COARSE_CLOCK_NS else -1
            found = (_read(file) for file in sorted(self.path.glob("*.json")))
            self._entries = {entry["key"]: entry for entry in found if entry is not None}
        except OSError as error:  # fail closed: a list that cannot be read admits nobody
            _LOG.error("allow list %s cannot be read (%s); nobody is admitted", self.path, error.strerror)
            self._entries = {}

    def write(self, key: str, content: Mapping[str, Any]) -> None:
        with self._lock:
            try:
                write_private_json(self.path / f"{fingerprint(key)}.json", {"key": key, **content})
            except OSError as error:
                raise ConfigError(f"state folder {self.path}: {error.strerror or error}") from error
            self._seen_ns, self._checked_at = -1, -math.inf

    def delete(self, key: str) -> None:
        with self._lock:
            (self.path / f"{fingerprint(key)}.json").unlink(missing_ok=True)
            self._seen_ns, self._checked_at = -1, -math.inf


def _read(file: Path) -> dict[str, Any] | None:
    try:
        with file.open("rb") as opened:
            entry = json.loads(opened.read(_MOST_FILE_BYTES + 1))
    except FileNotFoundError:  # deleted since the folder was listed
        return None
    except (OSError, ValueError, RecursionError) as error:
        _LOG.warning("skipped %s: %s", file, error)
        return None
    if not isinstance(entry, dict) or not is_key(entry.get("key")):
        _LOG.warning("skipped %s: it needs a 'key' of 40 Z85 characters", file)
        return None
    if file.stem != fingerprint(entry["key"]):
        _LOG.warning("skipped %s: its key belongs in %s.json", file, fingerprint(entry["key"]))
        return None
    return entry


class Admission:
    """The allow list of one base station. Thread-safe: the door, both planes and the operator use it."""

    def __init__(self, state: Path) -> None:
        """Open (or make) the lists in a state folder.

        Raises:
            ConfigError: the folder cannot be made.
        """
        self._devices = _KeyFolder(state / "devices")
        self._tokens = _KeyFolder(state / "tokens")
        self._redeeming = threading.Lock()

    def kind_of(self, key: str) -> Kind:
        """What a proven key may do right now. A look-up; the folders are looked at five times a second."""
        if key in self._devices.entries(_CHECK_INTERVAL_S):
            return "device"
        token = self._tokens.entries(_CHECK_INTERVAL_S).get(key)
        return "enrolment" if token is not None and _is_live(token) else "unknown"

    def devices(self) -> Sequence[AdmittedDevice]:
        """Everybody on the list, by name."""
        entries = self._devices.entries().values()
        found = [AdmittedDevice(e["key"], str(e.get("name", "")), _number(e, "admitted_unix")) for e in entries]
        return sorted(found, key=lambda device: (device.name, device.fingerprint))

    def admit(self, key: str, name: str) -> AdmittedDevice:
        """Put a device on the list. Idempotent.

        Raises:
            ConfigError: not a key, or the list cannot be written.
        """
        if not is_key(key):
            raise ConfigError("a device key has 40 Z85 characters")
        device = AdmittedDevice(key, name, time.time())
        self._devices.write(key, {"name": name, "admitted_unix": round(device.admitted_unix)})
        _LOG.info("admitted device %s (%s)", device.fingerprint, name)
        return device

    def enrol(self, enrolment_key: str, device_key: str, name: str) -> AdmittedDevice:
        """Admit a device that came with a join token's key, and take one use off the token.

        A device that asks again because the answer was lost is admitted again without another use.

        Raises:
            RefusedError: the token is unknown, expired or used up, or the key is not one.
        """
        if not is_key(device_key):
            raise RefusedError("the key to enrol is not a Z85 key of 40 characters")
        with self._redeeming:
            known = self._devices.entries().get(device_key)
            if known is not None:
                return AdmittedDevice(device_key, str(known.get("name", "")), _number(known, "admitted_unix"))
            token = self._tokens.entries().get(enrolment_key)
            if token is None or not _is_live(token):
                raise RefusedError("the join token is unknown, expired or used up; ask for a new one")
            device = self.admit(device_key, name)
            if "uses_left" in token:
                self._tokens.write(enrolment_key, {**token, "uses_left": int(_number(token, "uses_left")) - 1})
            return device

    def revoke(self, named: str) -> Sequence[AdmittedDevice]:
        """Take devices off the list: all of a name, or one by its key or fingerprint (its first 8 digits or more).

        All join tokens end with it: the board that is shut out may hold one, and come back with another key.

        Returns:
            Who was removed. Their connections carry nothing from 0.2 s on.
        Raises:
            ConfigError: nobody is meant by that.
        """
        wanted = named.strip()
        prefix = wanted if len(wanted) >= 8 else None
        meant = [
            device
            for device in self.devices()
            if (wanted and wanted in (device.name, device.key)) or (prefix and device.fingerprint.startswith(prefix))
        ]
        if not meant:
            raise ConfigError(f"no admitted device has the name, key or fingerprint {wanted!r}")
        for device in meant:
            self._devices.delete(device.key)
            _LOG.info("revoked device %s (%s)", device.fingerprint, device.name)
        for key in self._tokens.entries():
            self._tokens.delete(key)
        return meant

    def create_token(
        self,
        server: KeyPair,
        endpoints: Sequence[str],
        ttl_s: float,
        uses: int | None = None,
    ) -> JoinToken:
        """Make a join token and register its enrolment key. Expired ones are cleared away.

        Args:
            server: the base station's own pair; only the public half goes into the token.
            endpoints: of the control plane, as devices reach them.
            ttl_s: seconds until it expires.
            uses: devices that may join with it; None: as many as come.
        Raises:
            ConfigError: a value cannot be used, or the folder cannot be written.
        """
        if not 0 < ttl_s < math.inf:
            raise ConfigError(f"a token's life time must be positive, got {ttl_s}")
        if uses is not None and uses < 1:
            raise ConfigError(f"a token needs at least one use, got {uses}")
        self._clear_dead_tokens()
        expires_unix = math.floor(time.time() + ttl_s)
        token = JoinToken(
            endpoints=tuple(endpoints),
            server_key=server.public,
            enrolment=new_key_pair(),
            expires_unix=expires_unix,
        )
        limit = {} if uses is None else {"uses_left": uses}
        self._tokens.write(token.enrolment.public, {"expires_unix": expires_unix, **limit})
        return token

    def _clear_dead_tokens(self) -> None:
        for key, token in self._tokens.entries().items():
            if not _is_live(token):
                self._tokens.delete(key)


def _is_live(token: Mapping[str, Any]) -> bool:
    return time.time() < _number(token, "expires_unix") and _number(token, "uses_left", 1.0) > 0


def _number(entry: Mapping[str, Any], name: str, default: float = 0.0) -> float:
    value = entry.get(name, default)
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else 0.0
