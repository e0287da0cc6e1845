"""`broadcast`: two pictures in one waveform to two devices."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from wdmoe.cli.failures import needs_extra
from wdmoe.cli.params import DIRECTORY, FILE, TIME
from wdmoe.cli.running import run_until_stopped
from wdmoe.cli.tokens import tell_token
from wdmoe.config import state_home
from wdmoe.transport.descriptors import raise_descriptor_limit

if TYPE_CHECKING:
    from wdmoe.nodes.broadcast_station.listeners import Audience
    from wdmoe.nodes.broadcast_station.settings import BroadcastSettings


class Decibels(click.ParamType):  # type: ignore[type-arg]
    """`FIRST,SECOND` in dB, one for each user; one alone stands for both."""

    name = "dB,dB"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, float]:
        """Read both."""
        try:
            first, *rest = (float(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r}: give two numbers in dB, as in 10,5", param, ctx)
        if len(rest) > 1:
            self.fail(f"{value!r}: there are two users, so two numbers in dB, as in 10,5", param, ctx)
        return first, rest[0] if rest else first


class Alpha(click.ParamType):  # type: ignore[type-arg]
    """`auto`, handed on as None, or a number."""

    name = "auto|number"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float | None:
        """Read it."""
        if value == "auto":
            return None
        try:
            return float(str(value))
        except ValueError:
            self.fail(f"{value!r}: give auto, or a number from 0 to 1", param, ctx)


class Fraction(click.ParamType):  # type: ignore[type-arg]
    """A number, or `A/B`."""

    name = "fraction"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Read it."""
        above, slash, below = str(value).partition("/")
        try:
            return float(above) / float(below) if slash else float(above)
        except (ValueError, ZeroDivisionError):
            self.fail(f"{value!r}: give a fraction, as in 1/6 or 0.25", param, ctx)


@click.command()
@click.argument("first", type=click.Path(path_type=Path))
@click.argument("second", type=click.Path(path_type=Path))
@click.option(
    "--out", type=DIRECTORY, default="broadcast", show_default=True, help="Folder for the pictures and figures."
)
@click.option(
    "--snr",
    "snr_db",
    type=Decibels(),
    default="10,5",
    show_default=True,
    help="Signal-to-noise ratios of the two emulated channels.",
)
@click.option(
    "--alpha",
    type=Alpha(),
    default="auto",
    show_default=True,
    help="Share of the waveform that belongs to the first user, from 0 to 1. auto: chosen for --aim.",
)
@click.option(
    "--aim",
    default="",
    help="Goal of --alpha auto. max-min: the worse user. equal: both users alike. fair: proportional fairness. "
    "target:25dB@1: a PSNR of one user.  [default: max-min]",
)
@click.option(
    "--cbr",
    type=Fraction(),
    default="1/6",
    show_default=True,
    help="Channel bandwidth ratio: complex symbols of a block of 32x32 pixels over its 3072 values.",
)
@click.option(
    "--fading", type=click.Choice(("awgn", "rayleigh")), default="awgn", show_default=True, help="Kind of channel."
)
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Seed of both channels.")
@click.option("--model", type=FILE, help="Weights of another codec.  [default: the shipped ones]")
@click.option(
    "--bind",
    default="",
    help="Address where real devices connect, as in tcp://*:5555. Without it the command starts two local ones.",
)
@click.option("--advertise", default="", help="With --bind: host name or address that join tokens state.")
@click.option(
    "--wait-for-devices", "wait_s", type=TIME, default="2min", show_default=True, help="Longest wait for two devices."
)
@click.option(
    "--state", type=DIRECTORY, help="With --bind: folder of the station's key and of the list of admitted devices."
)
@click.option(
    "--print-token",
    is_flag=True,
    help="With --bind: print the join token itself, not only the name of its file. On a terminal that is the default.",
)
@click.option("--json", "as_json", is_flag=True, help="Print all figures as one JSON document, and nothing else.")
def broadcast(
    first: Path,
    second: Path,
    out: Path,
    snr_db: tuple[float, float],
    alpha: float | None,
    aim: str,
    cbr: float,
    fading: str,
    seed: int,
    model: Path | None,
    bind: str,
    advertise: str,
    wait_s: float,
    state: Path | None,
    print_token: bool,
    as_json: bool,
) -> int:
    """Send two pictures at once to two devices whose channels differ.

    The pictures FIRST and SECOND become one waveform, which is sent once. Each device passes it through its own
    emulated channel, decodes its own picture and sends that back. The folder OUT gets both pictures, a contact sheet
    that shows them beside the originals, and the figures. The pictures may differ in size, up to 4000x3000. Without
    --bind the command starts two device processes on this machine, over encrypted connections.

    The exit code is 1 if a picture did not come back.

    \b
    Examples:
      wdmoe-node broadcast cat.png dog.jpg
      wdmoe-node broadcast cat.png dog.jpg --snr 15,0 --alpha 0.3 --cbr 1/3 --fading rayleigh
      wdmoe-node broadcast cat.png dog.jpg --snr 15,0 --aim target:24dB@2
      wdmoe-node broadcast cat.png dog.jpg --bind tcp://*:5555       # then on two devices:
      wdmoe-node device --join @token.txt --save-pictures pictures
    """
    if not bind and (advertise or state or print_token):
        raise click.UsageError(
            "--advertise, --state and --print-token are for devices elsewhere: give --bind too, as tcp://*:5555"
        )
    with needs_extra("broadcast"):
        from wdmoe.nodes.broadcast_station.settings import BroadcastSettings

    settings = BroadcastSettings(
        pictures=(first, second),
        out=out,
        snr_db=snr_db,
        alpha=alpha,
        aim=aim,
        cbr=cbr,
        fading=fading,
        seed=seed,
        model=model,
        bind=bind,
        advertise=advertise,
        wait_s=wait_s,
        state=state or state_home() / "bs",
    )
    return _send(settings, as_json=as_json, print_token=print_token)


def _send(settings: BroadcastSettings, *, as_json: bool, print_token: bool) -> int:
    """Do it, say what came of it, and give the exit code."""
    from wdmoe.cli.progress import StageProgress

    with needs_extra("broadcast"):
        from wdmoe.nodes.broadcast_station.results import SHEET, prepare_folder, write_results
        from wdmoe.nodes.broadcast_station.run import broadcast as send
        from wdmoe.nodes.broadcast_station.run import prepare

    sending = prepare(settings, _note)
    prepare_folder(settings.out)
    ended: list[tuple[Audience, int]] = []
    with StageProgress("broadcast") as bar:

        async def work() -> None:
            ended.append(
                await send(sending, bar.reach, lambda text, file: tell_token(text, file, print_token, err=True))
            )

        raise_descriptor_limit()
        run_until_stopped(work())
    if not ended:
        raise click.Abort
    document, users = write_results(sending, *ended[0])
    if as_json:
        click.echo(json.dumps(document, indent=2))
    else:
        for user in users:
            click.echo(user.line())
        click.echo(
            f"{document['complex_symbols']} complex symbols, sent once for both devices; see {settings.out / SHEET}"
        )
    lost = [user for user in users if user.received is None]
    for user in lost if as_json else ():
        _note(user.line())
    return int(bool(lost))


def _note(line: str) -> None:
    print(line, file=sys.stderr)
