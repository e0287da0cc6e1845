"""Types of command line values: quantities with units, and secrets that may lie in a file."""

from __future__ import annotations

from pathlib import Path

import click
from click.core import ParameterSource

from wdmoe.config import MOST_HZ, check_budget, check_ranking, is_hertz
from wdmoe.errors import ConfigError
from wdmoe.units import Dimension, parse_quantity

MOST_USES = 1_000_000


class Quantity(click.ParamType):  # type: ignore[type-arg]  # generic only since click 8.4
    """A number with its unit, handed to the command as an SI float."""

    def __init__(self, dimension: Dimension) -> None:
        self.dimension = dimension
        self.name = dimension

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Read the text; anything else is a default that is in SI already."""
        if not isinstance(value, str):
            return float(value)  # type: ignore[arg-type]
        try:
            return parse_quantity(value, self.dimension)
        except ConfigError as error:
            self.fail(str(error), param, ctx)


class Quantities(click.ParamType):  # type: ignore[type-arg]
    """Quantities with commas in between, handed on as a tuple of SI floats."""

    def __init__(self, dimension: Dimension) -> None:
        self.name = f"{dimension},..."
        self._one = Quantity(dimension)

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        """Read each one."""
        return tuple(self._one.convert(part, param, ctx) for part in str(value).split(","))


class Share(click.ParamType):  # type: ignore[type-arg]
    """A part of a whole, as `0.05` or `5%`; handed on as a number from 0 to 1."""

    name = "share"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Read it."""
        text = str(value).strip()
        try:
            share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        except ValueError:
            self.fail(f"{value!r}: give a share, as in 5% or 0.05", param, ctx)
        if not 0 <= share <= 1:  # also refuses NaN
            self.fail(f"{value!r}: a share is from 0 to 1", param, ctx)
        return share


class Secret(click.ParamType):  # type: ignore[type-arg]
    """Text, or `@FILE` for the text in a file, so that it shows in no shell history and no `ps`."""

    name = "text|@file"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The text itself, without blanks around it."""
        text = str(value)
        file = text[1:] if text.startswith("@") else None
        try:
            secret = (text if file is None else Path(file).read_text(encoding="utf-8")).strip()
        except (OSError, UnicodeDecodeError) as error:
            self.fail(f"cannot read {file}: {error}", param, ctx)
        if not secret and (file is not None or _was_typed(param, ctx)):  # never the same as to give none
            self.fail(f"{file or 'it'} is empty", param, ctx)
        return secret


def _was_typed(param: click.Parameter | None, ctx: click.Context | None) -> bool:
    if param is None or ctx is None or param.name is None:
        return False
    return ctx.get_parameter_source(param.name) is ParameterSource.COMMANDLINE


def chosen_policy(
    policy: str | None, budget_s: float, per_token_s: float, default: str, max_dropped: float = 0.0
) -> str:
    """What `--policy` says, or `--budget` or `--max-dropped` means.

    Raises:
        click.UsageError: they do not go together.
    """
    chosen = policy or ("budget" if budget_s or max_dropped else default)
    try:
        check_budget(chosen, budget_s, per_token_s, max_dropped)
    except ConfigError as error:
        raise click.UsageError(str(error)) from error
    return chosen


def refuse_idle(name: str, used: bool, by: str) -> None:
    """Raises click.UsageError where the running command was given an option that nothing would look at.

    Args:
        name: of the command's parameter; what its default says, or the environment, is not refused.
        used: whether something looks at it.
        by: what would, as the user would say it.
    """
    context = click.get_current_context()
    if used or context.get_parameter_source(name) is not click.core.ParameterSource.COMMANDLINE:
        return
    flag = next(each.opts[0] for each in context.command.params if each.name == name)
    raise click.UsageError(f"{flag} does nothing here: it is for {by}")


def check_rank_flags(policy: str, rank: str, whole_layers: int) -> None:
    """Raises click.UsageError where `--rank` or `--whole-layers` would not be looked at."""
    try:
        check_ranking(policy, rank, whole_layers)
    except ConfigError as error:
        raise click.UsageError(str(error)) from error


class LinkSnr(click.ParamType):  # type: ignore[type-arg]
    """`DOWN` or `DOWN/UP`, in units of frequency; handed on as a pair of SI floats."""

    name = "frequency[/frequency]"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, float]:
        """Read both; one alone stands for both directions."""
        down, slash, up = str(value).partition("/")
        found = [FREQUENCY.convert(part, param, ctx) for part in (down, up if slash else down)]
        for part in found:
            if not is_hertz(part):
                self.fail(f"{value!r}: an SNR over a noise density must be from 1 Hz to {MOST_HZ:g} Hz", param, ctx)
        return found[0], found[1]


class Uses(click.ParamType):  # type: ignore[type-arg]
    """How many devices may join: a number, or `unlimited`, handed on as None."""

    name = "number|unlimited"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        """Read it."""
        text = str(value).strip()
        if text == "unlimited":
            return None
        if not text.isdecimal() or not 1 <= int(text) <= MOST_USES:
            self.fail(f"{value!r}: give a number from 1 to {MOST_USES}, or unlimited", param, ctx)
        return int(text)


FREQUENCY = Quantity("frequency")
TIME = Quantity("time")
SIZE = Quantity("size")
RATE = Quantity("rate")
RATES = Quantities("rate")
LINK_SNR = LinkSnr()
SHARE = Share()
SECRET = Secret()
USES = Uses()
DIRECTORY = click.Path(file_okay=False, path_type=Path)
FILE = click.Path(dir_okay=False, path_type=Path)


class Listen(click.ParamType):  # type: ignore[type-arg]
    """`HOST:PORT` for a server, or `off`; handed on as (host, port), with port -1 for off."""

    name = "host:port"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, int]:
        """Split at the last colon; an IPv6 host stands in brackets."""
        text = str(value)
        if text == "off":
            return "", -1
        host, colon, port = text.rpartition(":")
        if not colon or not port.isdecimal() or int(port) > 65535:
            self.fail(f"{text!r} is no HOST:PORT: write one as in 127.0.0.1:8080, or off", param, ctx)
        return host.removeprefix("[").removesuffix("]"), int(port)


LISTEN = Listen()
