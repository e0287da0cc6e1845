"""The commands that run until they are stopped: `bs` and `device`."""

from __future__ import annotations

from pathlib import Path

import click

from wdmoe.cli.bundles import find_bundle
from wdmoe.cli.failures import needs_extra
from wdmoe.cli.logs import tell_events
from wdmoe.cli.params import (
    DIRECTORY,
    FILE,
    FREQUENCY,
    LINK_SNR,
    LISTEN,
    RATE,
    SECRET,
    SHARE,
    SIZE,
    TIME,
    check_rank_flags,
    chosen_policy,
)
from wdmoe.cli.running import run_until_stopped
from wdmoe.config import (
    ALLOCATIONS,
    POLICIES,
    PROVIDERS,
    RANKS,
    DeviceSettings,
    LinkEmulation,
    StationSettings,
    cache_home,
    state_home,
)


@click.command()
@click.option(
    "--join",
    type=SECRET,
    envvar="WDMOE_JOIN",
    required=True,
    help="Join token that the base station printed, or @FILE with it; also from $WDMOE_JOIN.",
)
@click.option("--name", default="", help="Name shown to people.  [default: the host name]")
@click.option(
    "--provider",
    type=click.Choice(PROVIDERS),
    default="auto",
    show_default=True,
    help="What computes experts; auto takes the fastest that is there.",
)
@click.option(
    "--threads",
    type=click.IntRange(1, 1024),
    default=1,
    show_default=True,
    help="CPU threads for one expert; more only helps large experts.",
)
@click.option(
    "--memory",
    "memory_bytes",
    type=SIZE,
    default=0,
    help="Memory offered to experts.  [default: half of what is free]",
)
@click.option("--cache", type=DIRECTORY, help="Folder of experts kept for the next start.")
@click.option(
    "--cache-size",
    "cache_bytes",
    type=SIZE,
    default="4GiB",
    show_default=True,
    help="Most the cache may hold.",
)
@click.option("--state", type=DIRECTORY, help="Folder of this device's key, its identity over restarts.")
@click.option("--downlink", type=RATE, default=0, help="Emulate a radio link of this rate to the device.")
@click.option("--uplink", type=RATE, default=0, help="Emulate a radio link of this rate from the device.")
@click.option(
    "--link-snr",
    type=LINK_SNR,
    help="Emulate a link of this strength, DOWN[/UP], on whatever part of its --bandwidth the base station gives it: "
    "received power over noise density, a frequency. In a band that wide the SNR is 1 (0 dB), in a tenth of it 10.",
)
@click.option(
    "--save-pictures",
    type=DIRECTORY,
    help="Folder for the pictures that a `wdmoe-node broadcast` sends this device.",
)
@click.option("--insecure", is_flag=True, help="No encryption; --join is the base station's address then.")
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

    The device dials the base station. The join token admits it once, from then on its own key does. It
    receives its experts from there, and comes back by itself after the link is lost or either side restarts.

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
    run_until_stopped(run_device(settings))


@click.command()
@click.argument("bundle")
@click.option("--bind", default="tcp://*:5555", show_default=True, help="Where devices dial in.")
@click.option(
    "--advertise",
    default="",
    help="Host name or address that devices shall dial.  [default: this machine's addresses]",
)
@click.option(
    "--data-port",
    type=click.IntRange(0, 65535),
    default=0,
    help="Port for expert traffic.  [default: one above that of --bind]",
)
@click.option(
    "--http",
    type=LISTEN,
    default="127.0.0.1:8080",
    show_default=True,
    help="Where clients find the OpenAI-compatible API; off for none.",
)
@click.option(
    "--api-key",
    type=SECRET,
    envvar="WDMOE_API_KEY",
    default="",
    help="Key that clients must send, or @FILE with it; also from $WDMOE_API_KEY.",
)
@click.option(
    "--policy",
    type=click.Choice(POLICIES),
    help="Which experts serve a token: the gate's top k; or of those the ones worth their latency (cosine), all but "
    "light work of the device that would be last (bottleneck), or as much as fits --budget.  [default: topk; budget "
    "with --budget]",
)
@click.option(
    "--rank",
    type=click.Choice(("auto", *RANKS)),
    default="auto",
    show_default=True,
    help="What --policy ranks experts by: the gate's probabilities, or the squares of its scores, for routers that "
    "predict the norms of experts' outputs; auto does what the bundle says.",
)
@click.option(
    "--whole-layers",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="So many MoE layers from the first on drop nothing.",
)
@click.option(
    "--budget",
    "budget_s",
    type=TIME,
    default=0,
    help="Time that a pass through the model may spend in experts, all layers together, for --policy budget ...",
)
@click.option(
    "--budget-per-token",
    "budget_per_token_s",
    type=TIME,
    default=0,
    help="... plus this for each further token of a prompt; without it a prompt has the time of one token.",
)
@click.option(
    "--max-dropped",
    type=SHARE,
    default=0,
    help="Share of the experts' worth that a request may drop in each layer, for --policy budget, in place of a time.",
)
@click.option(
    "--bandwidth",
    "bandwidth_hz",
    type=FREQUENCY,
    default=0,
    help="A band that all devices share, given out anew in each layer. Each device must state its --link-snr.",
)
@click.option(
    "--allocation",
    type=click.Choice(ALLOCATIONS),
    help="Who gets how much of --bandwidth: optimal, so that a layer is done soonest, or equal.  [default: optimal]",
)
@click.option("--placement", type=FILE, help="Who holds what; `place` and `status --print-placement` write one.")
@click.option(
    "--copies",
    type=click.IntRange(1, 2),
    default=2,
    show_default=True,
    help="Devices that hold each expert, as far as their memory goes. With 2, a lost device costs time, not quality.",
)
@click.option("--record-trace", type=FILE, help="Leave a gate trace (.npz, no text) of what was served when it stops.")
@click.option(
    "--deadline",
    "deadline_s",
    type=TIME,
    default="1s",
    show_default=True,
    help="Longest wait for the experts of one layer ...",
)
@click.option(
    "--deadline-per-token",
    "deadline_per_token_s",
    type=TIME,
    default="20ms",
    show_default=True,
    help="... plus this for each token of a prompt.",
)
@click.option(
    "--prefill-chunk",
    type=click.IntRange(min=1),
    default=128,
    show_default=True,
    help="Tokens of a prompt computed before others get their turn.",
)
@click.option(
    "--max-active",
    type=click.IntRange(min=1),
    help="Requests computed at the same time.  [default: 4; 1 with --bandwidth, which one layer at a time gets whole]",
)
@click.option(
    "--max-queued",
    type=click.IntRange(min=0),
    default=16,
    show_default=True,
    help="Requests that may wait; more are answered 429.",
)
@click.option(
    "--lease",
    "lease_s",
    type=TIME,
    default="3s",
    show_default=True,
    help="Silence after which a device is lost.",
)
@click.option(
    "--device",
    default="auto",
    show_default=True,
    help="Where attention and gate run: auto, cpu, cuda, cuda:1.",
)
@click.option("--dtype", default="auto", show_default=True, help="float32, bfloat16, float16, or auto by device.")
@click.option("--threads", type=click.IntRange(0, 1024), default=0, help="CPU threads.  [default: torch's choice]")
@click.option("--state", type=DIRECTORY, help="Folder of the base station's key and the admitted devices.")
@click.option("--insecure", is_flag=True, help="No encryption, no admission: for closed networks only.")
@click.option("--commands", is_flag=True, hidden=True, help="Obey commands on standard input, as `demo` gives them.")
def bs(
    bundle: str,
    bind: str,
    advertise: str,
    data_port: int,
    http: tuple[str, int],
    api_key: str,
    policy: str | None,
    rank: str,
    whole_layers: int,
    budget_s: float,
    budget_per_token_s: float,
    max_dropped: float,
    bandwidth_hz: float,
    allocation: str | None,
    placement: Path | None,
    copies: int,
    record_trace: Path | None,
    deadline_s: float,
    deadline_per_token_s: float,
    prefill_chunk: int,
    max_active: int | None,
    max_queued: int,
    lease_s: float,
    device: str,
    dtype: str,
    threads: int,
    state: Path | None,
    insecure: bool,
    commands: bool,
) -> None:
    """Serve the model in BUNDLE, until stopped.

    BUNDLE is a folder made by `wdmoe-node export`, or the word default: the default model, made on first use.
    Prints a join token: run `wdmoe-node device --join TOKEN` on each device. Answers come once every expert
    has a device.

    \b
    Examples:
      wdmoe-node bs default
      wdmoe-node bs ./mixtral-bundle --http 0.0.0.0:8080 --api-key @key.txt --policy cosine
      wdmoe-node bs default --budget 150ms --whole-layers 1 --bandwidth 20MHz
      wdmoe-node bs default --max-dropped 5% --whole-layers 1 --bandwidth 20MHz
      curl 127.0.0.1:8080/v1/completions -H 'Content-Type: application/json' -d '{"prompt": "Once upon"}'
    """
    policy = chosen_policy(policy, budget_s, budget_per_token_s, "topk", max_dropped)
    check_rank_flags(policy, rank, whole_layers)
    if allocation and not bandwidth_hz:
        raise click.UsageError("--allocation says how --bandwidth is shared: give that too, as in --bandwidth 20MHz")
    tell_events()
    with needs_extra("bs"):
        folder = find_bundle(bundle)
    host, port = http
    settings = StationSettings(
        bundle=folder,
        bind=bind,
        data_port=data_port,
        advertise=advertise,
        http_host=host,
        http_port=port,
        api_key=api_key,
        policy=policy,
        rank=rank,
        whole_layers=whole_layers,
        bandwidth_hz=bandwidth_hz,
        allocation=allocation or "optimal",
        budget_s=budget_s,
        budget_per_token_s=budget_per_token_s,
        max_dropped=max_dropped,
        deadline_s=deadline_s,
        deadline_per_token_s=deadline_per_token_s,
        prefill_chunk=prefill_chunk,
        max_active=max_active or (1 if bandwidth_hz else 4),
        max_queued=max_queued,
        lease_s=lease_s,
        device=device,
        dtype=dtype,
        threads=threads,
        placement=placement,
        copies=copies,
        record_trace=record_trace,
        state=state or state_home() / "bs",
        insecure=insecure,
    )
    run_until_stopped(_serve(settings, commands))


async def _serve(settings: StationSettings, commands: bool) -> None:
    """A base station and its HTTP face."""
    with needs_extra("bs"):
        from wdmoe.nodes.base_station.base_station import BaseStation
        from wdmoe.nodes.base_station.commands import obey
        from wdmoe.serving.server import serve_http
        from wdmoe.tasks import run_together
    host, port = settings.http_host, settings.http_port
    async with BaseStation(settings) as station:
        _tell_how_to_join(station.join_text, settings.insecure)
        parts = [station.run()]
        if port >= 0:
            parts.append(serve_http(station.engine, host, port, settings.api_key, ready=_tell_url))
        if commands:
            parts.append(obey(station, settings, click.echo))
        await run_together(*parts)


def _tell_how_to_join(text: str, insecure: bool) -> None:
    click.echo(f"{'Address' if insecure else 'Join token (a secret)'}: {text}")
    click.echo(f"On each device: wdmoe-node device --join {'ADDRESS --insecure' if insecure else 'TOKEN'}")


def _tell_url(url: str) -> None:
    click.echo(f"HTTP: {url}/v1 (OpenAI-compatible), {url}/health, {url}/metrics")
