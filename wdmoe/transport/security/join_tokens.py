"""Join tokens: what a fresh device needs to find its base station, to know it for sure, and to be let in."""

from __future__ import annotations

import base64
import binascii
import json
import time
import zlib
from dataclasses import dataclass
from typing import Any

from wdmoe.errors import ConfigError
from wdmoe.transport.security.keys import KeyPair, is_key, pair_of_secret

_PREFIX = "wdmoe1."
_CHECK_BYTES = 4
_MOST_CHARACTERS = 4096
_MOST_ENDPOINTS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinToken:
    """What a token carries. The enrolment key opens the control plane only, until expired or used up."""

    endpoints: tuple[str, ...]  # control plane, tcp://host:port, best first
    server_key: str  # the base station's public key, pinned by the device
    enrolment: KeyPair
    expires_unix: float

    def __post_init__(self) -> None:
        if not 1 <= len(self.endpoints) <= _MOST_ENDPOINTS:
            raise ConfigError(f"a join token names 1 to {_MOST_ENDPOINTS} endpoints, not {len(self.endpoints)}")
        for endpoint in self.endpoints:
            if not endpoint.startswith("tcp://") or "*" in endpoint or not endpoint.isprintable():
                raise ConfigError(f"a join token needs endpoints like tcp://192.168.1.2:5555, not {endpoint!r}")

    def is_expired(self) -> bool:
        """Whether a base station refuses it by now; a device that is admitted already can still use it."""
        return time.time() >= self.expires_unix

    def text(self) -> str:
        """One line that survives mail, QR codes and shells. It is a secret while it lives."""
        fields = {
            "e": list(self.endpoints),
            "s": self.server_key,
            "k": self.enrolment.secret,
            "t": int(self.expires_unix),
        }
        raw = json.dumps(fields, separators=(",", ":")).encode()
        checked = raw + zlib.crc32(raw).to_bytes(_CHECK_BYTES, "big")
        return _PREFIX + base64.urlsafe_b64encode(checked).decode().rstrip("=")

    def __str__(self) -> str:
        return f"join token for {self.endpoints[0]}"  # never the secret by accident


def parse_token(text: str) -> JoinToken:
    """Read what `JoinToken.text` wrote; white space around it does not matter.

    Raises:
        ConfigError: one line saying what is wrong with it.
    """
    text = text.strip()
    if not text.startswith(_PREFIX):
        if text.startswith("wdmoe"):
            raise ConfigError(f"this join token is of another version; this program reads {_PREFIX}...")
        raise ConfigError(f"not a join token: it must start with {_PREFIX}")
    if len(text) > _MOST_CHARACTERS:
        raise ConfigError(f"not a join token: longer than {_MOST_CHARACTERS} characters")
    body = text[len(_PREFIX) :]
    try:
        checked = base64.b64decode(body + "=" * (-len(body) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise ConfigError("the join token holds characters that no token has; copy it again") from None
    raw, check = checked[:-_CHECK_BYTES], checked[-_CHECK_BYTES:]
    if zlib.crc32(raw).to_bytes(_CHECK_BYTES, "big") != check:
        raise ConfigError("the join token is incomplete or mistyped (its checksum is wrong); copy it again")
    return _token_of(raw)


def _token_of(raw: bytes) -> JoinToken:
    try:
        fields: dict[str, Any] = json.loads(raw)
        token = JoinToken(
            endpoints=tuple(str(endpoint) for endpoint in fields["e"]),
            server_key=fields["s"],
            enrolment=pair_of_secret(fields["k"]),
            expires_unix=float(fields["t"]),
        )
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ConfigError("the join token's content is not what a token holds; ask for a new one") from None
    if not is_key(token.server_key):
        raise ConfigError("the join token's server key is not a key; ask for a new one")
    return token
