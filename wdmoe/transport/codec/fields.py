"""The kinds of field a message may have: how each is written to a header, and what a peer may write there.

A kind raises ValueError with half a sentence ("must be ...") where a value does not fit;
`wdmoe.transport.codec.schema` puts the field's name in front and makes it a ProtocolError. Reading is strict (exact
types, closed ranges), because a peer wrote the value; writing takes what Python code naturally holds (NumPy
scalars, lists) and then applies the same rules.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

Frame: TypeAlias = bytes | memoryview
Array: TypeAlias = npt.NDArray[Any]
_Form: TypeAlias = tuple["np.dtype[Any]", tuple[int, ...], int, tuple[tuple[str, int], ...]]

UINT64_MAX = 2**64 - 1
INT63_MAX = 2**63 - 1
INT32_MAX = 2**31 - 1

# Little-endian on every host: the byte order belongs to the wire, not to the machine.
DTYPES: Mapping[str, np.dtype[Any]] = {
    "f32": np.dtype("<f4"),
    "f16": np.dtype("<f2"),
    "i32": np.dtype("<i4"),
    "i64": np.dtype("<i8"),
    "u8": np.dtype("u1"),
}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_COPY_BELOW_BYTES = 32768  # below this a copy is cheaper than the views a zero-copy frame needs
_SHOWN_CHARACTERS = 40


def shown(value: object) -> str:
    """A short, one-line picture of a value for an error message. Never the whole of a hostile one."""
    if isinstance(value, (str, bytes, int, float, bool, type(None))):
        text = repr(value[:_SHOWN_CHARACTERS] if isinstance(value, (str, bytes)) else value)
        return text if len(text) <= 2 * _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "..."
    return f"a {type(value).__name__}"


class Field(Protocol):
    """One header field."""

    def pack(self, value: Any) -> Any:
        """What goes into the header for `value`. Raises ValueError, TypeError."""
        ...

    def unpack(self, wire: Any) -> Any:
        """The value of what a peer wrote. Raises ValueError."""
        ...


class Int:
    """An integer from `least` to `most`."""

    def __init__(self, most: int = INT63_MAX, least: int = 0) -> None:
        self._least, self._most = least, most

    def pack(self, value: Any) -> int:
        """See `Field`."""
        return self.unpack(value if type(value) is int else operator.index(value))

    def unpack(self, wire: Any) -> int:
        """See `Field`."""
        if type(wire) is int and self._least <= wire <= self._most:  # bool is an int, but not of this type
            return wire
        raise ValueError(f"must be an integer from {self._least} to {self._most}, got {shown(wire)}")


class Number:
    """A finite float: zero or more, or within other bounds."""

    def __init__(self, least: float = 0.0, most: float = math.inf) -> None:
        self._least, self._most = least, most
        self._what = "zero or more" if (least, most) == (0.0, math.inf) else f"from {least:g} to {most:g}"

    def pack(self, value: Any) -> float:
        """See `Field`."""
        return self.unpack(float(value))

    def unpack(self, wire: Any) -> float:
        """See `Field`."""
        if type(wire) is float and self._least <= wire <= self._most and wire < math.inf:  # also refuses NaN
            return wire
        raise ValueError(f"must be a finite float, {self._what}, got {shown(wire)}")


class Flag:
    """True or false."""

    def pack(self, value: Any) -> bool:
        """See `Field`."""
        return bool(value)

    def unpack(self, wire: Any) -> bool:
        """See `Field`."""
        if type(wire) is bool:
            return wire
        raise ValueError(f"must be true or false, got {shown(wire)}")


class Text:
    """One printable line for people. What is too long or unprintable is tidied when it is written."""

    def __init__(self, most: int) -> None:
        self._most = most

    def pack(self, value: Any) -> str:
        """See `Field`."""
        line = " ".join(str(value).split())
        if not line.isprintable():
            line = "".join(c if c.isprintable() else "?" for c in line)
        return line[: self._most]

    def unpack(self, wire: Any) -> str:
        """See `Field`."""
        if type(wire) is str and len(wire) <= self._most and wire.isprintable():  # a newline forges log lines
            return wire
        raise ValueError(f"must be at most {self._most} printable characters, got {shown(wire)}")


class Code:
    """A machine-readable string: empty, or a full match of `pattern`."""

    def __init__(self, pattern: str, what: str) -> None:
        self._match = re.compile(pattern).fullmatch
        self._what = what

    def pack(self, value: Any) -> str:
        """See `Field`."""
        return self.unpack(value)

    def unpack(self, wire: Any) -> str:
        """See `Field`."""
        if type(wire) is str and (not wire or self._match(wire)):
            return wire
        raise ValueError(f"must be empty or {self._what}, got {shown(wire)}")


class Ints:
    """A short tuple of integers from `least` to `most`, at least one."""

    def __init__(self, most: int, least: int = 0) -> None:
        self._least, self._most = least, most

    def pack(self, value: Any) -> tuple[int, ...]:
        """See `Field`."""
        return self.unpack(tuple(map(operator.index, value)))

    def unpack(self, wire: Any) -> tuple[int, ...]:
        """See `Field`."""
        if type(wire) is not tuple or not wire:
            raise ValueError(f"must be a list of at least one integer, got {shown(wire)}")
        for value in wire:
            if type(value) is not int or not self._least <= value <= self._most:
                raise ValueError(f"must hold integers from {self._least} to {self._most}, got {shown(value)}")
        return wire


class Tensor:
    """A raw frame beside the header, which holds `(dtype name, *shape)`. The frame is little-endian bytes.

    `shape` names its dimensions or fixes them: a name stands for the same length in the whole message. With
    `least`, no element may be smaller.
    """

    def __init__(self, dtypes: Sequence[str], shape: Sequence[str | int], least: int | None = None) -> None:
        self._dtypes = frozenset(dtypes)
        self._shape = tuple(shape)
        self._least = least
        # The same few shapes come again and again. `typed`, because True and 1.0 are equal to 1.
        self._form = lru_cache(maxsize=256, typed=True)(self._read_form)

    def pack(self, array: Array, dimensions: dict[str, int]) -> tuple[tuple[str | int, ...], Frame]:
        """The header entry and the frame. The frame of a large array is its own memory, not a copy."""
        entry = (_DTYPE_NAMES.get(array.dtype) or array.dtype.name, *array.shape)  # .name is slow
        _, _, size_bytes, named = self._form(*entry)
        self._agree(array, named, dimensions)
        if size_bytes < _COPY_BELOW_BYTES:
            return entry, array.tobytes()
        flat = np.ascontiguousarray(array).reshape(-1)
        return entry, flat.view(np.uint8).data

    def unpack(self, entry: Any, frame: Frame, dimensions: dict[str, int]) -> Array:
        """The array a peer described, over the frame's own memory where that is aligned.

        Args:
            entry: what the header says.
            frame: what came with it.
            dimensions: lengths of the names met so far in this message; extended here.
        """
        if type(entry) is not tuple:
            raise ValueError(f"must be {self}, got {shown(entry)}")
        try:
            dtype, shape, size_bytes, named = self._form(*entry)
        except TypeError:  # a map inside: not hashable
            raise ValueError(f"must be {self}, got a map as dtype or dimension") from None
        if size_bytes != len(frame):
            raise ValueError(f"of shape {shape} needs a frame of {size_bytes} bytes, got {len(frame)}")
        array: Array = np.ndarray(shape, dtype, frame)
        if not array.flags.aligned:  # ZeroMQ hands out the middle of its buffers; native code wants whole words
            array = array.copy()
        self._agree(array, named, dimensions)
        return array

    def _agree(self, array: Array, named: tuple[tuple[str, int], ...], dimensions: dict[str, int]) -> None:
        for name, length in named:
            if dimensions.setdefault(name, length) != length:
                raise ValueError(f"has {length} {name} where the message has {dimensions[name]}")
        if self._least is not None and array.size and int(array.min()) < self._least:
            raise ValueError(f"must not hold values below {self._least}, got {int(array.min())}")

    def _read_form(self, *entry: Any) -> _Form:
        dtype_name, *shape = entry or ("",)
        if dtype_name not in self._dtypes or len(shape) != len(self._shape):
            raise ValueError(f"must be {self}, got {shown(dtype_name)} with {len(shape)} dimensions")
        dtype = DTYPES[dtype_name]
        size_bytes = dtype.itemsize  # Python integers: a product that would overflow elsewhere is only large here
        for wanted, length in zip(self._shape, shape, strict=True):
            if type(length) is not int or not 0 <= length <= INT32_MAX:
                raise ValueError(f"must have dimensions from 0 to {INT32_MAX}, got {shown(length)}")
            if type(wanted) is int and length != wanted:
                raise ValueError(f"must be {self}, got {length} where {wanted} stands")
            size_bytes *= length
        named = tuple((name, n) for name, n in zip(self._shape, shape, strict=True) if type(name) is str)
        return dtype, tuple(shape), size_bytes, named

    def __str__(self) -> str:
        return f"{'/'.join(sorted(self._dtypes))} ({', '.join(map(str, self._shape))})"
