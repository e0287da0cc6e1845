"""Reading TOML that people wrote: every key is known, has its type and unit, or one line says what is wrong."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from wdmoe.errors import ConfigError
from wdmoe.units import Dimension, parse_quantity


class Table:
    """One table of the file. Ask for all keys, then call `done`: what nobody asked for is refused by name."""

    def __init__(self, values: Any, path: str) -> None:
        """`path`: how an error names the table, as in "[radio]"."""
        if not isinstance(values, dict):
            raise ConfigError(f"{path} must be a table, got {values!r}")
        self._values = values
        self._path = path
        self._known: list[str] = []

    @property
    def stated(self) -> Mapping[str, Any]:
        """What stands in the file, unread."""
        return self._values

    def table(self, key: str) -> Table:
        """A table inside; empty where it is not there."""
        return Table(self._get(key, {}), f"[{key}]")

    def tables(self, key: str) -> list[Table]:
        """An array of tables, at least one."""
        found = self._get(key, [])
        if not isinstance(found, list) or not found:
            raise ConfigError(f"{self._path} needs at least one [[{key}]]")
        return [Table(each, f"[[{key}]] number {number}") for number, each in enumerate(found, 1)]

    def text(self, key: str, default: str | None = None, among: Sequence[str] = ()) -> str:
        """A text; with `among`, one of these. No default: it must be there."""
        value = self._get(key, default)
        if not isinstance(value, str) or (among and value not in among):
            wanted = f"one of {', '.join(among)}" if among else "a text"
            raise self._wrong(key, wanted, value)
        return value

    def flag(self, key: str, default: bool = False) -> bool:
        """true or false."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, "true or false", value)
        return value

    def switch(self, key: str, among: Sequence[str]) -> str:
        """One of these texts; false and true stand for the first, the default, and the second."""
        value = self._get(key, False)
        if isinstance(value, bool):
            return among[value]
        if value not in among:
            raise self._wrong(key, f"true, false or one of {', '.join(among)}", value)
        return str(value)

    def integer(self, key: str, default: int | None, least: int, most: int) -> int:
        """An integer within bounds."""
        value = self._get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise self._wrong(key, f"an integer from {least} to {most}", value)
        return value

    def number(self, key: str, default: float | None, least: float = -math.inf, most: float = math.inf) -> float:
        """A finite number within bounds."""
        return self._number(key, self._get(key, default), least, most)

    def numbers(self, key: str, default: Sequence[float] | None, least: float, most: float = math.inf) -> list[float]:
        """One number or several."""
        value = self._get(key, default)
        many = list(value) if isinstance(value, (list, tuple)) else [value]
        if not many:
            raise self._wrong(key, "at least one number", value)
        return [self._number(key, each, least, most) for each in many]

    def quantity(self, key: str, dimension: Dimension, default: str | None) -> float:
        """A text with its unit, in SI."""
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, f"a {dimension} in quotes, with its unit", value)
        try:
            return parse_quantity(value, dimension)
        except ConfigError as error:
            raise ConfigError(f"{self._path} {key}: {error}") from error

    def done(self) -> None:
        """Refuse what was not asked for."""
        for key in self._values:
            if key not in self._known:
                raise ConfigError(f"{self._path} has no key {key!r}; known are {', '.join(sorted(self._known))}")

    def _get(self, key: str, default: Any) -> Any:
        self._known.append(key)
        value = self._values.get(key, default)
        if value is None:
            raise ConfigError(f"{self._path} needs {key}")
        return value

    def _number(self, key: str, value: Any, least: float, most: float) -> float:
        fits = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not fits or not least <= value <= most:
            raise self._wrong(key, f"a finite number from {least:g} to {most:g}", value)
        return float(value)

    def _wrong(self, key: str, wanted: str, got: object) -> ConfigError:
        return ConfigError(f"{self._path} {key} must be {wanted}, got {got!r}")
