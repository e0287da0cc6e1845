"""`bs`: serves a model until it is stopped."""

from __future__ import annotations

from pathlib import Path

import click

from wdmoe.cli.bundles import alias_of, find_bundle
from wdmoe.cli.failures import check_installed, needs_extra
from wdmoe.cli.logs import log_setup, tell_events
from wdmoe.cli.params import (
    DIRECTORY,
    FILE,
    FREQUENCY,
    LISTEN,
    SECRET,
    SHARE,
    SIZE,
    TIME,
    USES,
    check_rank_flags,
    chosen_policy,
    refuse_idle,
)
from wdmoe.cli.running import run_until_stopped
from wdmoe.cli.tokens import tell_address, tell_token
from wdmoe.config import (
    ALLOCATIONS,
    ENGINES,
    JOIN_USES,
    POLICIES,
    RANKS,
    STATION_PRECISIONS,
    StationSettings,
    state_home,
)
from wdmoe.transport.descriptors import raise_descriptor_limit


@click.command()
@click.argument("bundle")
@click.option("--bind", default="tcp://*:5555", show_default=True, help="Address where devices connect.")
@click.option(
    "--advertise",
    default="",
    help="Host name or address that join tokens state.  [default: this machine's addresses]",
)
@click.option(
    "--data-port",
    type=click.IntRange(0, 65535),
    default=0,
    help="Port for expert traffic.  [default: the port of --bind plus one]",
)
@click.option(
    "--http",
    type=LISTEN,
    default="127.0.0.1:8080",
    show_default=True,
    help="Address of the OpenAI-compatible API. off serves none.",
)
@click.option(
    "--api-key",
    type=SECRET,
    envvar="WDMOE_API_KEY",
    default="",
    help="Key that clients must send, or @FILE that holds it; also from $WDMOE_API_KEY.",
)
@click.option(
    "--policy",
    type=click.Choice(POLICIES),
    help="Which experts serve a token. topk: the gate's top k. cosine: those of them that are worth their latency. "
    "bottleneck: all but light work of the device that would be last. budget: as much gate weight as "
    "fits --budget, or the fastest choice within --max-dropped.  [default: topk; budget with one of these]",
)
@click.option(
    "--rank",
    type=click.Choice(("auto", *RANKS)),
    default="auto",
    show_default=True,
    help="How --policy ranks experts. probability: by the gate's probabilities. energy: by the squares of its scores, "
    "for routers that predict the norms of experts' outputs. auto: as the bundle says.",
)
@click.option(
    "--whole-layers",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Number of leading MoE layers that never drop experts.",
)
@click.option(
    "--budget",
    "budget_s",
    type=TIME,
    default=0,
    help="For --policy budget: time that one token may spend in the experts of all layers together ...",
)
@click.option(
    "--budget-per-token",
    "budget_per_token_s",
    type=TIME,
    default=0,
    help="... plus this time for each further token of a prompt. Without it a whole prompt gets the time of one token.",
)
@click.option(
    "--max-dropped",
    type=SHARE,
    default=0,
    help="For --policy budget, in place of a time: share of the experts' worth that a request may drop in each layer.",
)
@click.option(
    "--bandwidth",
    "bandwidth_hz",
    type=FREQUENCY,
    default=0,
    help="Radio band that all devices share. Each layer divides it anew. Each device must state its --link-snr.",
)
@click.option(
    "--allocation",
    type=click.Choice(ALLOCATIONS),
    help="How devices share --bandwidth. optimal: each layer ends as early as it can. equal: equal parts.  "
    "[default: optimal]",
)
@click.option(
    "--placement",
    type=FILE,
    help="File that says which device holds which experts. `place` and `status --print-placement` write one.",
)
@click.option(
    "--copies",
    type=click.Choice(("auto", "1", "2", "3")),
    default="auto",
    show_default=True,
    help="Devices that hold each expert, where memory allows. With 2 copies a lost device costs time, not quality. "
    "auto: 2, and further copies on devices that would otherwise hold nothing.",
)
@click.option(
    "--verify",
    type=SHARE,
    default="5%",
    show_default=True,
    help="Share of the answers of a trusted device that the base station computes again. Of a new device, or one that "
    "answered wrong, it looks at more. With 0 it only looks at answers of an odd size.",
)
@click.option(
    "--record-trace",
    type=FILE,
    help="When the base station stops, write a gate trace (.npz, without text) of what it served.",
)
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
    help="... plus this time for each token of a prompt.",
)
@click.option(
    "--wait-for-experts",
    "wait_for_experts_s",
    type=TIME,
    default="20s",
    show_default=True,
    help="Longest wait between two tokens for experts that every device lost, while others load them. 0s: none.",
)
@click.option(
    "--prefill-chunk",
    type=click.IntRange(min=1),
    default=128,
    show_default=True,
    help="Most tokens of prompts in a pass; beside answers in work fewer. By transformers: tokens of a prompt that are "
    "computed before another request gets its turn.",
)
@click.option(
    "--max-active",
    type=click.IntRange(min=1),
    help="Requests that are computed at the same time, as far as --kv-memory has room.  [default: 32 in graphs, where "
    "all share each pass; by transformers 4, and 1 with --bandwidth]",
)
@click.option(
    "--kv-memory",
    "kv_bytes",
    type=SIZE,
    default=0,
    help="Memory for keys and values of these requests, in graphs. Who does not fit waits.  [default: half of what is "
    "free once the model is loaded]",
)
@click.option(
    "--max-queued",
    type=click.IntRange(min=0),
    default=16,
    show_default=True,
    help="Requests that may wait. Further requests get the answer 429.",
)
@click.option(
    "--lease",
    "lease_s",
    type=TIME,
    default="3s",
    show_default=True,
    help="Silence after which a device counts as lost.",
)
@click.option(
    "--engine",
    type=click.Choice(ENGINES),
    default="auto",
    show_default=True,
    help="What computes attention and gate: graphs in ONNX Runtime, or transformers, which knows every family and is "
    "in the extra export. auto: graphs where there are some for the model.",
)
@click.option(
    "--station-precision",
    type=click.Choice(STATION_PRECISIONS),
    default="fp32",
    show_default=True,
    help="Of the large matrices of attention, shared expert and vocabulary, in graphs. On the default model int8 costs "
    "0.6 % of perplexity, and int4 30 %.",
)
@click.option(
    "--prefix-cache",
    "prefix_cache_bytes",
    type=SIZE,
    default="256MiB",
    show_default=True,
    help="Memory for keys and values of former requests, in graphs: one that begins with the same tokens, as the next "
    "turn of a chat, computes and sends only what is new. 0: none is kept.",
)
@click.option(
    "--device",
    default="auto",
    show_default=True,
    help="Where attention and gate run: auto, cpu, cuda or cuda:1.",
)
@click.option(
    "--dtype",
    default="auto",
    show_default=True,
    help="Number type of attention and gate: float32, bfloat16, float16, or auto (by --device).",
)
@click.option(
    "--threads",
    type=click.IntRange(0, 1024),
    default=0,
    help="CPU threads of attention and gate.  [default: in graphs half of the cores, 4 at most; else all]",
)
@click.option("--state", type=DIRECTORY, help="Folder of the base station's key and of the list of admitted devices.")
@click.option(
    "--join-uses",
    type=USES,
    default=JOIN_USES,
    show_default=True,
    help="Devices that may join by one join token, or unlimited. A token that is used up is replaced.",
)
@click.option(
    "--print-token",
    is_flag=True,
    help="Print the join token itself, not only the name of its file. On a terminal that is the default.",
)
@click.option("--insecure", is_flag=True, help="Use no encryption and admit everybody: for closed networks only.")
@click.option("--commands", is_flag=True, hidden=True, help="Obey commands on standard input, as `demo` sends them.")
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
    copies: str,
    verify: float,
    record_trace: Path | None,
    deadline_s: float,
    deadline_per_token_s: float,
    wait_for_experts_s: float,
    prefill_chunk: int,
    max_active: int | None,
    kv_bytes: float,
    max_queued: int,
    lease_s: float,
    device: str,
    dtype: str,
    engine: str,
    station_precision: str,
    prefix_cache_bytes: float,
    threads: int,
    state: Path | None,
    join_uses: int | None,
    print_token: bool,
    insecure: bool,
    commands: bool,
) -> None:
    """Serve the model in BUNDLE, until stopped.

    BUNDLE is a folder that `wdmoe-node export` made, or the word default: the default model, which is made on first
    use. Clients may ask for the model by its own name, by the word default, or by the name of the folder.

    Devices need a join token: run `wdmoe-node device --join @FILE` on each. The command keeps one in the file
    join-token of its state folder, and prints it on a terminal; `wdmoe-node token` prints further ones. The base
    station answers as soon as every expert has a device. Stop it with Ctrl-C or SIGTERM: answers in work have 5 seconds
    to finish.

    \b
    Examples:
      wdmoe-node bs default
      wdmoe-node bs ./mixtral-bundle --http 0.0.0.0:8080 --api-key @key.txt --policy cosine
      wdmoe-node bs default --budget 150ms --whole-layers 1 --bandwidth 20MHz
      wdmoe-node bs default --max-dropped 3% --whole-layers 1 --bandwidth 20MHz
      curl 127.0.0.1:8080/v1/completions -H 'Content-Type: application/json' -d '{"prompt": "Once upon"}'
    """
    policy = chosen_policy(policy, budget_s, budget_per_token_s, "topk", max_dropped)
    check_rank_flags(policy, rank, whole_layers)
    for bound in ("budget_s", "budget_per_token_s", "max_dropped"):
        refuse_idle(bound, policy == "budget", "--policy budget")
    refuse_idle("api_key", http[1] >= 0, "a station with --http")
    by_transformers = engine == "transformers" or record_trace is not None
    for of_graphs in ("kv_bytes", "prefix_cache_bytes"):
        refuse_idle(of_graphs, not by_transformers, "graphs, and this base station computes by transformers")
    if allocation and not bandwidth_hz:
        raise click.UsageError("--allocation says how --bandwidth is shared: give that too, as in --bandwidth 20MHz")
    tell_events()
    check_installed("bs", "fastapi", "uvicorn", "jinja2", "onnx", "onnxruntime", "tokenizers")
    if by_transformers:
        check_installed("export", "torch", "transformers")
    raise_descriptor_limit()
    with needs_extra("bs"):
        from wdmoe.backbone.format.bundle import Bundle

        folder = find_bundle(bundle)
        Bundle.open(folder)  # what is wrong with it is said at once, not after what the processes take to start
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
        wait_for_experts_s=wait_for_experts_s,
        prefill_chunk=prefill_chunk,
        max_active=max_active or 0,
        kv_bytes=int(kv_bytes),
        max_queued=max_queued,
        lease_s=lease_s,
        device=device,
        dtype=dtype,
        engine=engine,
        station_precision=station_precision,
        prefix_cache_bytes=int(prefix_cache_bytes),
        threads=threads,
        placement=placement,
        copies=0 if copies == "auto" else int(copies),
        verify=verify,
        record_trace=record_trace,
        state=state or state_home() / "bs",
        join_uses=join_uses,
        insecure=insecure,
    )
    run_until_stopped(_serve(settings, alias_of(bundle), commands, print_token))


async def _serve(settings: StationSettings, alias: str, commands: bool, print_token: bool) -> None:
    """A base station in a process of its own, and its HTTP face in this one."""
    with needs_extra("bs"):
        from wdmoe.nodes.supervised.command_lines import obey
        from wdmoe.nodes.supervised.supervisor import Supervisor
        from wdmoe.serving.server import serve_http
        from wdmoe.tasks import run_together
    host, port = settings.http_host, settings.http_port
    async with Supervisor(settings, log_setup()) as station:
        if settings.insecure:
            tell_address(station.join_text)
        else:
            tell_token(station.join_text, settings.join_file, print_token)
        parts = [station.run()]
        if port >= 0:
            parts.append(serve_http(station.engine, host, port, settings.api_key, aliases=[alias], ready=_tell_url))
        if commands:
            parts.append(obey(station.engine.command, click.echo))
        await run_together(*parts)


def _tell_url(url: str) -> None:
    click.echo(f"HTTP: {url}/v1 (OpenAI-compatible), {url}/health, {url}/metrics")
