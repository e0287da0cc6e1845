"""The commands that make and check models: `split`, `export` and `verify`."""

from __future__ import annotations

from pathlib import Path

import click

from wdmoe.cli.failures import needs_extra
from wdmoe.cli.params import DIRECTORY, FILE
from wdmoe.config import PRECISIONS
from wdmoe.results.folder import BROADCAST_KIND, LOSSES_KIND, SIMULATION_KIND, kind_of
from wdmoe.units import format_quantity


@click.command()
@click.argument("model", type=DIRECTORY)
@click.argument("bundle", type=DIRECTORY)
@click.option(
    "--precision",
    type=click.Choice(PRECISIONS),
    default="fp32",
    show_default=True,
    help="Of the experts' weights. int8 is a quarter of the size, fp16 half.",
)
@click.option("--name", default="", help="Model name shown to clients.  [default: the folder's]")
def export(model: Path, bundle: Path, precision: str, name: str) -> None:
    """Turn a Mixture-of-Experts checkpoint into a bundle.

    The folder MODEL holds config.json and safetensors, as transformers saves them. No more memory is used
    than the largest layer needs. Run it again with the same arguments to go on after an interruption.

    \b
    Examples:
      wdmoe-node export ./Mixtral-8x7B-v0.1 ./mixtral-bundle --precision int8
      wdmoe-node export ./OLMoE-1B-7B ./olmoe-bundle --name olmoe
    """
    with needs_extra("bs"):
        from wdmoe.backbone.export.export import ExportSettings, export_bundle
    from wdmoe.cli.progress import ByteProgress

    settings = ExportSettings(precision=precision, name=name)
    with ByteProgress(f"export {model.name}") as progress:
        made = export_bundle(model, bundle, settings, progress)
    size = sum(file.size for file in made.experts)
    layers = len(made.moe_layers)
    click.echo(
        f"{bundle}: {made.model}, {len(made.experts)} experts in {layers} layers, "
        f"{format_quantity(size, 'size')} of {made.precision} for the devices"
    )


@click.command()
@click.argument("dense", type=click.Path(path_type=Path))
@click.argument("moe", type=DIRECTORY)
@click.option("--experts", type=click.IntRange(min=2), default=8, show_default=True, help="Of each layer.")
@click.option(
    "--shared",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.5,
    show_default=True,
    help="Share of each layer's neurons, the strongest, that stays at the base station.",
)
@click.option("--top-k", type=click.IntRange(min=1), default=4, show_default=True, help="Experts that serve a token.")
@click.option(
    "--calibration",
    type=FILE,
    multiple=True,
    help="Text to fit the router on; may be repeated.  [default: text that comes along]",
)
@click.option(
    "--held-out",
    type=FILE,
    multiple=True,
    help="Other text, to measure perplexity on; may be repeated.  [default: text that comes along]",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
def split(
    dense: Path,
    moe: Path,
    experts: int,
    shared: float,
    top_k: int,
    calibration: tuple[Path, ...],
    held_out: tuple[Path, ...],
    seed: int,
) -> None:
    """Split a dense model into experts.

    DENSE is a Llama-like checkpoint: a folder of safetensors, or a GGUF file. The folder MOE becomes a
    Mixture-of-Experts checkpoint that transformers loads and `wdmoe-node export` takes. Prints the perplexity of
    both on text that the split was not fitted on.

    \b
    Examples:
      wdmoe-node split ./SmolLM2-135M-Instruct.gguf ./smol-moe
      wdmoe-node split ./Llama-3.2-1B ./llama-moe --experts 16 --top-k 6 --shared 0.4
      wdmoe-node split ./Llama-3.2-1B ./llama-moe --calibration mine.txt --held-out other.txt
    """
    with needs_extra("bs"):
        from wdmoe.backbone.split.settings import SplitSettings
        from wdmoe.backbone.split.split import split_checkpoint
    from wdmoe.cli.progress import StageProgress

    settings = SplitSettings(
        experts=experts, shared=shared, top_k=top_k, calibration=calibration, held_out=held_out, seed=seed
    )
    with StageProgress(f"split {dense.name}") as progress:
        report = split_checkpoint(dense, moe, settings, progress.reach)
    click.echo(
        f"{moe}: {settings.top_k} of {settings.experts} experts a token; perplexity on {report.tokens} tokens "
        f"{report.split_perplexity:.2f}, dense {report.dense_perplexity:.2f}, ratio {report.ratio:.3f}"
    )


@click.command()
@click.argument("folder", type=DIRECTORY)
@click.option(
    "--draws", type=click.IntRange(min=1), help="Of results, run only the first so many again.  [default: all]"
)
def verify(folder: Path, draws: int | None) -> None:
    """Check a bundle's files and graphs, or results of a simulation or of the broadcast comparison.

    Of a bundle every file must be what its manifest says, and every expert's graph must be sound. Results of
    wdmoe-node simulate must have unchanged files, and running the scenario again must give the same figures; so must
    those of tools/study/broadcast_region and tools/study/broadcast_losses, for as many pairs of pictures as --draws
    says.

    \b
    Examples:
      wdmoe-node verify ./mixtral-bundle
      wdmoe-node verify ./journal-results --draws 10     # a sample; without it every draw
    """
    kind = kind_of(folder)
    if kind == SIMULATION_KIND:
        _verify_results(folder, draws)
    elif kind == BROADCAST_KIND:
        _verify_broadcast(folder, draws)
    elif kind == LOSSES_KIND:
        _verify_losses(folder, draws)
    else:
        _verify_bundle(folder)


def _verify_results(folder: Path, draws: int | None) -> None:
    with needs_extra("sim"):
        from wdmoe.simulation.results import verify_results
    from wdmoe.cli.progress import CountProgress

    with CountProgress(f"verify {folder.name}", "draws") as progress:
        scenario, again = verify_results(folder, progress=progress.reach, draws=draws)
    of = "" if again == scenario.draws else f" of {scenario.draws}"
    click.echo(f"{folder} holds what {scenario.name} gives: {again}{of} draws run again, seed {scenario.seed}")


def _verify_broadcast(folder: Path, pairs: int | None) -> None:
    with needs_extra("broadcast"):
        from wdmoe.broadcast.study.verify import verify_results
    from wdmoe.cli.progress import StageProgress

    with StageProgress(f"verify {folder.name}") as progress:
        again = verify_results(folder, pairs, progress.reach)
    photographs = " and of the photographs" if again.photographs else ""
    click.echo(
        f"{folder} holds what its codecs give: {again.pairs} pairs of each of {again.settings} settings{photographs} "
        "run again"
    )


def _verify_losses(folder: Path, pairs: int | None) -> None:
    with needs_extra("broadcast"):
        from wdmoe.broadcast.study.loss_results import verify_losses
    from wdmoe.cli.progress import StageProgress

    with StageProgress(f"verify {folder.name}") as progress:
        again = verify_losses(folder, pairs, progress.reach)
    if again.systems:
        ran = f"{', '.join(again.systems)} run again on {again.pairs} pairs of each of {again.settings} settings"
    else:
        ran = "the weights are not in the folder, so nothing was run again"
    click.echo(f"{folder} holds what its figures of every pair give; {ran}")


def _verify_bundle(folder: Path) -> None:
    with needs_extra("bs"):
        import onnx  # noqa: F401 - the check of graphs needs it, far below

        from wdmoe.backbone.format.bundle import Bundle
    from wdmoe.cli.progress import ByteProgress

    opened = Bundle.open(folder)
    with ByteProgress(f"verify {folder.name}") as progress:
        opened.verify(progress.reach)
    manifest = opened.manifest
    click.echo(
        f"{folder} is sound: {manifest.model}, {len(manifest.experts)} experts ({manifest.precision}), "
        f"{len(manifest.station)} files of the base station, digest {manifest.digest[:16]}"
    )
