"""Who may connect: the allow list of one base station.

    STATE/devices/<fingerprint>.json    {"key", "name", "admitted_unix"}
    STATE/tokens/<fingerprint>.json     {"key", "created_unix", "expires_unix", "uses_left"}
    STATE/revoked/<fingerprint>.json    the name counts, whatever it holds

A key is admitted if it is on one of the first two lists and not on the third. Each of these is a positive record. That
a file is gone, or cannot be read, changes nothing while the base station runs. All are looked at again ten times a
second, so another process (`wdmoe-node token`) can admit and revoke meanwhile.
"""

from __future__ import annotations

import logging
import math
import re
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from wdmoe.errors import ConfigError, RefusedError
from wdmoe.transport.security.join_tokens import JoinToken
from wdmoe.transport.security.keys import KeyPair, fingerprint, is_key, new_key_pair
from wdmoe.transport.security.record_folder import Record, RecordFolder
from wdmoe.transport.security.revocations import Revocations
from wdmoe.transport.security.token_lives import TokenLives, number

_LOG = logging.getLogger(__name__)
_CHECK_INTERVAL_S = 0.1  # a revoked device is cut off after this long
_MOST_VERDICTS = 4096
_FINGERPRINT = re.compile(r"[0-9a-f]{16}")
DEVICES, TOKENS, REVOKED = "devices", "tokens", "revoked"  # in the state folder

Kind: TypeAlias = Literal["device", "enrolment", "revoked", "unknown"]


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


@dataclass(frozen=True, slots=True)
class LiveToken:
    """A join token that devices can still use, without its secret."""

    key: str
    expires_unix: float
    uses_left: int | None  # None: as many as come

    @property
    def fingerprint(self) -> str:
        """Its name in logs, and of its file."""
        return fingerprint(self.key)


@dataclass(frozen=True, slots=True)
class Revoked:
    """One key that was shut out."""

    fingerprint: str
    name: str  # "": of a device that was not on the list


class Admission:
    """The allow list of one base station. Thread-safe: the door, both planes and the operator use it."""

    def __init__(self, state: Path) -> None:
        """Use the lists in a state folder. Makes nothing: folders that are missing are made by the first write."""
        self.state = state
        self._revoked = Revocations(state / REVOKED)
        self._lives = TokenLives()
        self._devices = RecordFolder(state / DEVICES, lambda device: self._revoked.holds(_name(device)) is True)
        self._tokens = RecordFolder(state / TOKENS, self._is_over)
        self._redeeming = threading.Lock()
        self._verdicts: dict[str, tuple[float, Kind]] = {}  # key -> (when, what), of known keys

    # ---- questions

    def kind_of(self, key: str) -> Kind:
        """What a proven key may do right now. A look-up; the folders are looked at ten times a second."""
        verdict, now_s = self._verdicts.get(key), time.monotonic()
        if verdict is not None and now_s - verdict[0] < _CHECK_INTERVAL_S:
            return verdict[1]
        kind = self._judge(key)
        if kind != "unknown":  # of those anybody can make as many as they like
            if len(self._verdicts) >= _MOST_VERDICTS:
                self._verdicts.clear()
            self._verdicts[key] = (now_s, kind)
        return kind

    def _judge(self, key: str) -> Kind:
        listed = key in self._devices.entries(_CHECK_INTERVAL_S)
        token = self._tokens.entries(_CHECK_INTERVAL_S).get(key)
        if not listed and token is None:
            return "revoked" if self._revoked.look(fingerprint(key)) else "unknown"
        revoked = self._revoked.holds(fingerprint(key))
        if revoked:
            return "revoked"
        if revoked is None:  # nothing was ever known of it: nobody new comes in
            return "unknown"
        if listed:
            return "device"
        return "enrolment" if token is not None and self._is_live(token) else "unknown"

    def devices(self) -> Sequence[AdmittedDevice]:
        """Everybody who is admitted, by name."""
        records = [each for each in self._devices.entries().values() if not self._is_revoked(each)]
        return sorted(map(_device_of, records), key=lambda device: (device.name, device.fingerprint))

    def tokens(self) -> Sequence[LiveToken]:
        """Tokens that devices can still join with, the next to expire first."""
        live = [each for each in self._tokens.entries().values() if self._is_live(each) and not self._is_revoked(each)]
        return sorted(map(_token_of, live), key=lambda token: (token.expires_unix, token.key))

    def life_left_s(self, key: str) -> float:
        """Seconds until the token of this enrolment key ends; 0 where it has ended, in whatever way."""
        token = self._tokens.entries().get(key)
        if token is None or not self._is_live(token) or self._is_revoked(token):
            return 0.0
        return self._lives.left_s(key, token)

    @property
    def faults(self) -> int:
        """Files of the lists that cannot be read now, or are gone: what was known before still holds."""
        return self._devices.faults + self._tokens.faults + self._revoked.faults

    @property
    def unread(self) -> int:
        """As `faults`, but all of them so far."""
        return self._devices.unread + self._tokens.unread + self._revoked.unread

    # ---- admitting

    def admit(self, key: str, name: str) -> AdmittedDevice:
        """Put a device on the list, also one that was revoked. Idempotent.

        Raises:
            ConfigError: not a key, or the list cannot be written.
        """
        if not is_key(key):
            raise ConfigError("a device key has 40 Z85 characters")
        self._make_folders()
        device = AdmittedDevice(key, name, time.time())
        self._devices.write(key, {"name": name, "admitted_unix": round(device.admitted_unix)})
        if self._revoked.holds(device.fingerprint) is not False:
            self._revoked.remove(device.fingerprint)
        self._verdicts.pop(key, None)
        _LOG.info("admitted device %s (%s)", device.fingerprint, name)
        return device

    def enrol(self, enrolment_key: str, device_key: str, name: str) -> AdmittedDevice:
        """Admit a device that came with a join token's key, and take one use off the token.

        A device that asks again because the answer was lost is admitted again without another use. One that was
        revoked is admitted again: revoking ended all tokens, so somebody gave it a new one.

        Raises:
            RefusedError: the token is unknown, expired or used up, or the key is not one.
            ConfigError: the lists cannot be read or written now. Nothing was changed, and trying again may help.
        """
        if not is_key(device_key):
            raise RefusedError("the key to enrol is not a Z85 key of 40 characters")
        with self._redeeming:
            was_revoked = self._revoked.holds(fingerprint(device_key))
            if was_revoked is None:
                raise ConfigError(f"state folder {self._revoked.path} cannot be looked at")
            known = self._devices.entries().get(device_key)
            if known is not None and not was_revoked:
                return _device_of(known)
            return self._redeem(enrolment_key, device_key, name)

    def _redeem(self, enrolment_key: str, device_key: str, name: str) -> AdmittedDevice:
        """The use is counted first: a crash in between costs one, and never gives one away."""
        token = self._tokens.entries().get(enrolment_key)
        if token is None or not self._is_live(token) or self._is_revoked(token):
            raise RefusedError("the join token is unknown, expired or used up; ask for a new one")
        if "uses_left" in token:
            self._tokens.write(enrolment_key, {**token, "uses_left": int(number(token, "uses_left")) - 1})
        try:
            device = self.admit(device_key, name)
        except ConfigError:
            if "uses_left" in token:
                self._tokens.write(enrolment_key, token)
            raise
        if self._is_revoked(token):  # while this went on: `revoke` ends the tokens first, so that this sees it
            self._shut_out(device)
            raise RefusedError("the join token was revoked just now; ask for a new one")
        self._verdicts.pop(enrolment_key, None)
        return device

    # ---- revoking

    def revoke(self, named: str) -> Sequence[Revoked]:
        """Shut devices out: all of a name, or one by its key or fingerprint (its first 8 digits or more).

        A whole key or fingerprint need not be on the list. All join tokens end with it, and first: the board that is
        shut out may hold one, and come back with another key.

        Returns:
            Who was shut out. Their connections carry nothing from 0.2 s on.
        Raises:
            ConfigError: nobody is meant by that, or the lists cannot be written.
        """
        meant = self._meant(named.strip())
        self._make_folders()
        for key, token in self._tokens.entries().items():
            self._revoked.add(fingerprint(key), {**token, "revoked_unix": round(time.time())})
            self._tokens.delete(key)
        for device in meant:
            self._shut_out(device)
        self._verdicts.clear()
        return [device if isinstance(device, Revoked) else Revoked(device.fingerprint, device.name) for device in meant]

    def _meant(self, named: str) -> Sequence[AdmittedDevice | Revoked]:
        prefix = named if len(named) >= 8 else None
        found = [
            device
            for device in self.devices()
            if (named and named in (device.name, device.key)) or (prefix and device.fingerprint.startswith(prefix))
        ]
        if found:
            return found
        if is_key(named) or _FINGERPRINT.fullmatch(named):  # its file may be gone while it is still let in
            return [Revoked(fingerprint(named) if is_key(named) else named, "")]
        raise ConfigError(f"no admitted device has the name, key or fingerprint {named!r}")

    def _shut_out(self, device: AdmittedDevice | Revoked) -> None:
        record = {"name": device.name, "revoked_unix": round(time.time())}
        if isinstance(device, AdmittedDevice):
            record |= {"key": device.key, "admitted_unix": round(device.admitted_unix)}
        self._revoked.add(device.fingerprint, record)
        if isinstance(device, AdmittedDevice):
            self._devices.delete(device.key)
            self._verdicts.pop(device.key, None)
        _LOG.info("revoked device %s (%s)", device.fingerprint, device.name)

    # ---- tokens

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
        now_unix = time.time()
        token = JoinToken(
            endpoints=tuple(endpoints),
            server_key=server.public,
            enrolment=new_key_pair(),
            expires_unix=math.floor(now_unix + ttl_s),
        )
        self._make_folders()
        self._clear_dead_tokens()
        limit = {} if uses is None else {"uses_left": uses}
        life = {"created_unix": math.floor(now_unix), "expires_unix": int(token.expires_unix)}
        self._tokens.write(token.enrolment.public, {**life, **limit})
        return token

    def _clear_dead_tokens(self) -> None:
        for key, token in self._tokens.entries().items():
            if not self._is_live(token):
                self._tokens.delete(key)
        for name, record in self._revoked.records():
            if "expires_unix" in record and self._lives.left_s(name, record) <= 0:
                self._revoked.remove(name)

    # ---- inside

    def _make_folders(self) -> None:
        """In a state folder that has none of them. Where one is missing it was moved, and may be moved back."""
        folders = [self.state / name for name in (DEVICES, TOKENS, REVOKED)]
        try:
            if not any(folder.exists() for folder in folders):
                for folder in folders:
                    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"state folder {self.state}: {error.strerror or error}") from error

    def _is_live(self, token: Record) -> bool:
        return number(token, "uses_left", 1.0) > 0 and self._lives.left_s(token["key"], token) > 0

    def _is_revoked(self, record: Record) -> bool:
        """Also where that cannot be told."""
        return self._revoked.holds(_name(record)) is not False

    def _is_over(self, token: Record) -> bool:
        return self._revoked.holds(_name(token)) is True or not self._is_live(token)


def _name(record: Record) -> str:
    return fingerprint(record["key"])


def _device_of(record: Record) -> AdmittedDevice:
    return AdmittedDevice(record["key"], str(record.get("name", "")), number(record, "admitted_unix"))


def _token_of(record: Record) -> LiveToken:
    uses_left = int(number(record, "uses_left")) if "uses_left" in record else None
    return LiveToken(record["key"], number(record, "expires_unix"), uses_left)
