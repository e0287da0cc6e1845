"""The commands that make and check models: `export` and `verify`."""

from __future__ import annotations

from pathlib import Path

import click

from wdmoe.cli.failures import needs_extra
from wdmoe.cli.params import DIRECTORY
from wdmoe.config import PRECISIONS
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
        from wdmoe.backbone.export import ExportSettings, export_bundle
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
@click.argument("bundle", type=DIRECTORY)
def verify(bundle: Path) -> None:
    """Check a bundle's files and graphs.

    Every file of the folder BUNDLE must be what its manifest says, and every expert's graph must be sound.

    \b
    Example:
      wdmoe-node verify ./mixtral-bundle
    """
    with needs_extra("bs"):
        import onnx  # noqa: F401 - the check of graphs needs it, far below

        from wdmoe.backbone.bundle import Bundle
    from wdmoe.cli.progress import ByteProgress

    opened = Bundle.open(bundle)
    with ByteProgress(f"verify {bundle.name}") as progress:
        opened.verify(progress.reach)
    manifest = opened.manifest
    click.echo(
        f"{bundle} is sound: {manifest.model}, {len(manifest.experts)} experts ({manifest.precision}), "
        f"{len(manifest.station)} files of the base station, digest {manifest.digest[:16]}"
    )
