"""`token`: who may join a base station. Works on its state folder, whether it runs or not."""

from __future__ import annotations

import datetime
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from wdmoe.cli.params import DIRECTORY, TIME, USES
from wdmoe.cli.tables import print_table, printable
from wdmoe.config import JOIN_USES, state_home
from wdmoe.errors import ConfigError

if TYPE_CHECKING:
    from wdmoe.transport.security.admission import AdmittedDevice, LiveToken
    from wdmoe.transport.security.station_state import StationState

_STATE = click.option(
    "--state",
    type=DIRECTORY,
    help="The base station's state folder.  [default: ~/.local/state/wdmoe/bs]",
)
_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object, and nothing else.")


@click.group(invoke_without_command=True)
@click.pass_context
def token(ctx: click.Context) -> None:
    """Make join tokens, list the admitted devices, and shut devices out.

    Without a subcommand it makes a token. It works while the base station runs, and before.
    """
    if ctx.invoked_subcommand is None:
        ctx.invoke(create)


@token.command()
@_STATE
@click.option(
    "--endpoint",
    "endpoints",
    multiple=True,
    help="Address where devices reach the base station; may be repeated, best first.  "
    "[default: the addresses of its last run, else this machine's addresses with port 5555]",
)
@click.option("--ttl", type=TIME, default="24h", show_default=True, help="How long devices may join with this token.")
@click.option(
    "--uses",
    type=USES,
    default=JOIN_USES,
    show_default=True,
    help="How many devices may join with this token, or unlimited.",
)
@click.option(
    "--new",
    is_flag=True,
    help="Begin a new base station in the folder --state, where none has run yet. Without --state that is the default.",
)
@_JSON
def create(
    state: Path | None, endpoints: tuple[str, ...], ttl: float, uses: int | None, new: bool, as_json: bool
) -> None:
    """Print a new join token. Keep it secret: whoever has it may join until it expires.

    A folder that --state names must be that of a base station: a token of another one opens no door. Say --new to make
    a token before the base station's first start there.

    With --json: token, fingerprint, endpoints, expires_unix (seconds), uses (null: unlimited), state.

    \b
    Examples:
      wdmoe-node token create --uses 1 > token.txt
      wdmoe-node token create --endpoint tcp://192.0.2.7:5555 --ttl 10min
      wdmoe-node token create --state ./second --new > token.txt      # before the first: bs default --state ./second
    """
    from wdmoe.nodes.addresses import last_endpoints
    from wdmoe.transport.security.station_state import make_or_open_state, open_state

    folder = state or _default_state()
    opened = make_or_open_state(folder) if new or state is None else open_state(folder)
    made = opened.admission.create_token(opened.keys, endpoints or last_endpoints(folder), ttl, uses)
    if not as_json:
        click.echo(made.text())
        return
    _print_json(
        token=made.text(),
        fingerprint=made.enrolment.fingerprint,
        endpoints=list(made.endpoints),
        expires_unix=int(made.expires_unix),
        uses=uses,
        state=str(folder),
    )


@token.command(name="list")
@_STATE
@_JSON
def list_devices(state: Path | None, as_json: bool) -> None:
    """List the devices that were admitted.

    With --json: devices (name, fingerprint, key, admitted_unix) and the live join tokens (fingerprint, expires_unix,
    uses_left, null: unlimited), without their secrets.
    """
    admission = _open(state).admission
    devices = admission.devices()
    if as_json:
        tokens = admission.tokens()
        _print_json(devices=[_device_fields(each) for each in devices], tokens=[_token_fields(each) for each in tokens])
    else:
        print_table(("device", "fingerprint", "admitted"), _rows(devices))
    if admission.faults:
        raise ConfigError(f"{admission.faults} files of {admission.state} cannot be read; the list lacks them")


def _rows(devices: Sequence[AdmittedDevice]) -> list[tuple[str, str, str]]:
    found = []
    for device in devices:
        since = datetime.datetime.fromtimestamp(device.admitted_unix).astimezone()
        found.append((device.name, device.fingerprint, since.strftime("%Y-%m-%d %H:%M")))
    return found


def _device_fields(device: AdmittedDevice) -> dict[str, object]:
    return {
        "name": device.name,
        "fingerprint": device.fingerprint,
        "key": device.key,
        "admitted_unix": int(device.admitted_unix),
    }


def _token_fields(made: LiveToken) -> dict[str, object]:
    return {"fingerprint": made.fingerprint, "expires_unix": int(made.expires_unix), "uses_left": made.uses_left}


class _AnyName(click.Command):
    """A command whose one argument may begin with a dash, as a device's name or key may."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put words that look like options and are none behind `--`, where click takes them as they are."""
        takes_value = {name: not option.is_flag for option in self._options(ctx) for name in option.opts}
        options: list[str] = []
        names: list[str] = []
        words = iter(args)
        for word in words:
            if word == "--":
                names += words
            elif not word.startswith("-") or word.partition("=")[0] not in takes_value:
                names.append(word)
            else:
                options.append(word)
                options += itertools.islice(words, 1 if takes_value.get(word) else 0)
        return super().parse_args(ctx, [*options, "--", *names])

    def _options(self, ctx: click.Context) -> list[click.Option]:
        return [param for param in self.get_params(ctx) if isinstance(param, click.Option)]


@token.command(cls=_AnyName)
@_STATE
@_JSON
@click.argument("device")
def revoke(state: Path | None, as_json: bool, device: str) -> None:
    """Shut out DEVICE: its name, its public key, its fingerprint, or the start of that.

    It takes effect at once, also while the device works. The device goes on asking, once a minute, and is let in again
    when it comes with a new token.

    With --json: revoked (name, fingerprint) and state.

    \b
    Example:
      wdmoe-node token revoke kitchen
    """
    gone = _open(state).admission.revoke(device)
    if as_json:
        shut_out = [{"name": each.name, "fingerprint": each.fingerprint} for each in gone]
        _print_json(revoked=shut_out, state=str(state or _default_state()))
        return
    for each in gone:
        click.echo(f"{printable(each.name or 'a device that is not on the list')} ({each.fingerprint}) is shut out")
    click.echo("All join tokens are void now. The other devices stay admitted.")


def tell_token(text: str, file: Path, always: bool, *, err: bool = False) -> None:
    """Name the file of a join token; print the token where no log keeps it, or always.

    Args:
        text: the token.
        file: where it lies.
        always: it was asked for.
        err: say it on standard error.
    """
    if always or (sys.stderr if err else sys.stdout).isatty():
        click.echo(f"Join token (a secret): {text}", err=err)
    click.echo(f"The join token lies in {file}. Copy it to each device, and run there:", err=err)
    click.echo(f"  wdmoe-node device --join @{file.name}", err=err)


def tell_address(address: str) -> None:
    """Of a station without keys."""
    click.echo(f"Address: {address}")
    click.echo("On each device: wdmoe-node device --join ADDRESS --insecure")


def _default_state() -> Path:
    return state_home() / "bs"


def _open(state: Path | None) -> StationState:
    """The state folder of a base station that was there before: looking makes none."""
    from wdmoe.transport.security.station_state import open_state

    return open_state(state or _default_state())


def _print_json(**fields: object) -> None:
    click.echo(json.dumps(fields, indent=2, ensure_ascii=False))
