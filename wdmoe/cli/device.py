"""`device`: computes experts until it is stopped."""

from __future__ import annotations

from pathlib import Path

import click

from wdmoe.cli.failures import needs_extra
from wdmoe.cli.logs import tell_events
from wdmoe.cli.params import (
    DIRECTORY,
    LINK_SNR,
    RATE,
    SECRET,
    SIZE,
)
from wdmoe.cli.running import run_until_stopped
from wdmoe.config import (
    PROVIDERS,
    DeviceSettings,
    LinkEmulation,
    cache_home,
    state_home,
)
from wdmoe.transport.descriptors import raise_descriptor_limit


@click.command()
@click.option(
    "--join",
    type=SECRET,
    envvar="WDMOE_JOIN",
    required=True,
    help="Join token of the base station, or @FILE that holds it; also from $WDMOE_JOIN.",
)
@click.option("--name", default="", help="Name shown to people.  [default: the host name]")
@click.option(
    "--provider",
    type=click.Choice(PROVIDERS),
    default="auto",
    show_default=True,
    help="What computes the experts. auto takes the fastest that works here.",
)
@click.option(
    "--threads",
    type=click.IntRange(1, 1024),
    default=1,
    show_default=True,
    help="CPU threads for one expert. More threads help large experts only.",
)
@click.option(
    "--memory",
    "memory_bytes",
    type=SIZE,
    default=0,
    help="Memory that this device offers to experts.  [default: half of what is free]",
)
@click.option("--cache", type=DIRECTORY, help="Folder that keeps experts for the next start.")
@click.option(
    "--cache-size",
    "cache_bytes",
    type=SIZE,
    default="4GiB",
    show_default=True,
    help="Largest size of the cache.",
)
@click.option("--state", type=DIRECTORY, help="Folder of this device's key. The key is the device's identity.")
@click.option("--downlink", type=RATE, default=0, help="Emulate a radio link of this rate to the device.")
@click.option("--uplink", type=RATE, default=0, help="Emulate a radio link of this rate from the device.")
@click.option(
    "--link-snr",
    type=LINK_SNR,
    help="Emulate a link of this strength, DOWN[/UP], over the part of --bandwidth that the base station gives this "
    "device. The strength is received power over noise density, a frequency: in a band of that width the SNR is 1 "
    "(0 dB), in a tenth of it 10.",
)
@click.option(
    "--save-pictures",
    type=DIRECTORY,
    help="Folder for pictures that `wdmoe-node broadcast` sends to this device.",
)
@click.option("--insecure", is_flag=True, help="Use no encryption. --join is then the base station's address.")
def device(
    join: str,
    name: str,
    provider: str,
    threads: int,
    memory_bytes: float,
    cache: Path | None,
    cache_bytes: float,
    state: Path | None,
    downlink: float,
    uplink: float,
    link_snr: tuple[float, float] | None,
    save_pictures: Path | None,
    insecure: bool,
) -> None:
    """Compute experts for a base station, until stopped.

    The device dials the base station. The join token admits it once; after that its own key admits it. The base
    station sends it its experts. The device reconnects by itself when the link fails or either side restarts.

    \b
    Examples:
      wdmoe-node device --join @token.txt
      wdmoe-node device --join @token.txt --name kitchen --memory 2GiB --provider cuda
      wdmoe-node device --join @token.txt --downlink 20Mbit/s --uplink 5Mbit/s
      wdmoe-node device --join @token.txt --link-snr 2GHz/400MHz
      wdmoe-node device --join tcp://192.0.2.7:5555 --insecure
    """
    snr_down_hz, snr_up_hz = link_snr or (0.0, 0.0)
    settings = DeviceSettings(
        join=join,
        name=name,
        provider=provider,
        threads=threads,
        memory_bytes=int(memory_bytes),
        cache=cache or cache_home() / "experts",
        cache_bytes=int(cache_bytes),
        state=state or state_home() / "device",
        link=LinkEmulation(
            downlink_bps=downlink, uplink_bps=uplink, downlink_snr_hz=snr_down_hz, uplink_snr_hz=snr_up_hz
        ),
        save_pictures=save_pictures,
        insecure=insecure,
    )
    with needs_extra("device"):
        from wdmoe.nodes.device.device import run_device
    tell_events()
    raise_descriptor_limit()
    run_until_stopped(run_device(settings))
