"""CURVE key pairs: made, kept in files that only their owner can read, and named by fingerprint elsewhere."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import zmq

from wdmoe.errors import ConfigError

_OTHERS = 0o077
_FINGERPRINT_HEX = 16
_KEY_CHARACTERS = 40


@dataclass(frozen=True, slots=True)
class KeyPair:
    """A CURVE key pair as Z85 text. The secret half is never shown."""

    public: str
    secret: str = field(repr=False)

    @property
    def fingerprint(self) -> str:
        """What stands for this pair in logs and file names."""
        return fingerprint(self.public)


def new_key_pair() -> KeyPair:
    """A fresh random pair."""
    public, secret = zmq.curve_keypair()
    return KeyPair(public.decode(), secret.decode())


def pair_of_secret(secret: str) -> KeyPair:
    """The pair that a secret half belongs to.

    Raises:
        ValueError: it is not a Z85 key.
    """
    if len(secret) != _KEY_CHARACTERS:
        raise ValueError(f"a key has {_KEY_CHARACTERS} characters, not {len(secret)}")
    try:
        return KeyPair(zmq.curve_public(secret.encode()).decode(), secret)
    except (zmq.ZMQError, UnicodeError, ValueError):
        raise ValueError("not a Z85 key") from None  # the cause may quote the secret


def is_key(text: object) -> bool:
    """Whether `text` is a Z85 key of 32 bytes."""
    if not isinstance(text, str) or len(text) != _KEY_CHARACTERS:
        return False
    try:
        pair_of_secret(text)  # the encoding is the same for both halves
    except ValueError:
        return False
    return True


def fingerprint(public_key: str) -> str:
    """Short name of a public key: the first 16 hex digits of its SHA-256."""
    return hashlib.sha256(public_key.encode()).hexdigest()[:_FINGERPRINT_HEX]


def station_keys(state: Path) -> KeyPair:
    """The base station's identity in its state folder, made on first use. Raises as `load_or_create`."""
    return load_or_create(state / "station.key")


def device_keys(state: Path) -> KeyPair:
    """A device's identity in its state folder, made on first use. Raises as `load_or_create`."""
    return load_or_create(state / "device.key")


def load_or_create(path: Path) -> KeyPair:
    """Read a key file, or make the pair and the file (mode 0600, its folder 0700).

    Raises:
        ConfigError: the file is damaged, readable by others, or cannot be read or written.
    """
    try:
        if path.exists():
            return _load(path)
        pair = new_key_pair()
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_private_json(path, {"public": pair.public, "secret": pair.secret})
    except OSError as error:
        raise ConfigError(f"key file {path}: {error.strerror or error}") from error
    return pair


def _load(path: Path) -> KeyPair:
    with path.open(encoding="ascii") as file:
        mode = os.fstat(file.fileno()).st_mode & 0o777  # of the file that is read, not of its name
        if mode & _OTHERS:
            raise ConfigError(f"key file {path} can be read by others (mode {mode:03o}); run: chmod 600 {path}")
        try:
            pair = pair_of_secret(json.load(file)["secret"])
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ConfigError(f"key file {path} is damaged; restore it, or delete it to get a new identity") from None
    return pair


def write_private_json(path: Path, content: dict[str, Any]) -> None:
    """As `write_private_text`, of an object as JSON."""
    write_private_text(path, f"{json.dumps(content, indent=1)}\n")


def write_private_text(path: Path, text: str) -> None:
    """Write a small file (mode 0600) so that a reader, or a crash, sees the old one or the new one whole."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".new-")  # mkstemp makes it 0600
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):  # its folder was moved away
            os.unlink(temporary)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make what was created, renamed or deleted in a folder outlive a power cut. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
