"""`token`: who may join a base station. Works on its state folder, whether it runs or not."""

from __future__ import annotations

import datetime
import itertools
from pathlib import Path

import click

from wdmoe.cli.params import DIRECTORY, TIME
from wdmoe.cli.tables import print_table, printable
from wdmoe.config import state_home

_STATE = click.option(
    "--state",
    type=DIRECTORY,
    default=lambda: state_home() / "bs",
    show_default="~/.local/state/wdmoe/bs",
    help="The base station's state folder.",
)


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
    "--uses", type=click.IntRange(min=1), help="How many devices may join with this token.  [default: any number]"
)
def create(state: Path, endpoints: tuple[str, ...], ttl: float, uses: int | None) -> None:
    """Print a new join token. Keep it secret: whoever has it may join until it expires.

    \b
    Examples:
      wdmoe-node token create --uses 1 > token.txt
      wdmoe-node token create --endpoint tcp://192.0.2.7:5555 --ttl 10min
    """
    from wdmoe.nodes.addresses import last_endpoints
    from wdmoe.transport.security.admission import Admission
    from wdmoe.transport.security.keys import station_keys

    made = Admission(state).create_token(station_keys(state), endpoints or last_endpoints(state), ttl, uses)
    click.echo(made.text())


@token.command(name="list")
@_STATE
def list_devices(state: Path) -> None:
    """List the devices that were admitted."""
    from wdmoe.transport.security.admission import Admission

    rows = []
    for device in Admission(state).devices():
        since = datetime.datetime.fromtimestamp(device.admitted_unix).astimezone()
        rows.append((device.name, device.fingerprint, since.strftime("%Y-%m-%d %H:%M")))
    print_table(("device", "fingerprint", "admitted"), rows)


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
@click.argument("device")
def revoke(state: Path, device: str) -> None:
    """Shut out DEVICE: its name, its public key, its fingerprint, or the start of that.

    It takes effect at once, also while the device works.

    \b
    Example:
      wdmoe-node token revoke kitchen
    """
    from wdmoe.transport.security.admission import Admission

    for gone in Admission(state).revoke(device):
        click.echo(f"{printable(gone.name)} ({gone.fingerprint}) is shut out")
    click.echo("All join tokens are void now. The other devices stay admitted.")
