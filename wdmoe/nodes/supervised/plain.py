"""Records as bytes and back, for the private socket between the processes of one base station.

MessagePack, as on the wire to devices: a record travels as its class's name and its fields, a path as its text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import msgpack

from wdmoe import errors
from wdmoe.config import StationSettings
from wdmoe.errors import WdmoeError
from wdmoe.receipt import Receipt, StageSeconds
from wdmoe.records import Finished, GenerationRequest, Sampling, TextDelta, Waiting

_RECORD, _PATH = 1, 2  # kinds of MessagePack's extension type
_KINDS: dict[str, Callable[..., Any]] = {
    kind.__name__: kind
    for kind in (GenerationRequest, Sampling, TextDelta, Waiting, Finished, Receipt, StageSeconds, StationSettings)
}
_MOST_BYTES = 1 << 30  # of one message: bodies are bounded before, this only ends what is broken


def pack(message: object) -> bytes:
    """A message of plain types and records; lists come out as tuples at the other end."""
    data: bytes = msgpack.packb(message, default=_extended)
    return data


def unpacker() -> msgpack.Unpacker:
    """Takes bytes as they come, gives messages. Only for bytes of a process of ours."""
    return msgpack.Unpacker(use_list=False, ext_hook=_restored, max_buffer_size=_MOST_BYTES)


def told(error: BaseException) -> tuple[Any, ...]:
    """An exception as plain types."""
    if isinstance(error, OSError):
        return ("OSError", error.errno, error.strerror, None if error.filename is None else str(error.filename))
    return (type(error).__name__, str(error))


def heard(name: str, *words: Any) -> Exception:
    """The exception of `told`: one of ours by its name, what the system said, or else a bug."""
    if name == "OSError":
        number, text, file = words
        return OSError(number, text, file)
    kind = getattr(errors, name, None)
    if isinstance(kind, type) and issubclass(kind, WdmoeError):
        return kind(words[0])
    return RuntimeError(f"{name}: {words[0]}")


def _extended(value: object) -> msgpack.ExtType:
    if isinstance(value, Path):
        return msgpack.ExtType(_PATH, str(value).encode())
    name = type(value).__name__
    if name not in _KINDS:
        raise TypeError(f"a {name} does not travel between processes")
    content = {each.name: getattr(value, each.name) for each in fields(value)}  # type: ignore[arg-type]
    return msgpack.ExtType(_RECORD, pack((name, content)))


def _restored(kind: int, data: bytes) -> object:
    if kind == _PATH:
        return Path(data.decode())
    name, content = msgpack.unpackb(data, use_list=False, ext_hook=_restored)
    return _KINDS[name](**content)
