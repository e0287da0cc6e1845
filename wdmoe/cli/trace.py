"""The command that records a gate trace: `trace`."""

from __future__ import annotations

from pathlib import Path

import click

from wdmoe.cli.failures import needs_extra
from wdmoe.cli.params import FILE
from wdmoe.units import format_quantity


@click.command()
@click.argument("model")
@click.argument("out", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--text",
    type=FILE,
    multiple=True,
    help="Text file that the model reads; may be repeated.  [default: the shipped text]",
)
@click.option("--tokens", type=click.IntRange(min=1), default=1024, show_default=True, help="Number of tokens in all.")
@click.option("--window", type=click.IntRange(min=1), default=256, show_default=True, help="Tokens of one sequence.")
@click.option("--similarity", is_flag=True, help="Also record the similarity of neighbouring tokens' hidden states.")
@click.option(
    "--expert-similarity",
    is_flag=True,
    help="Also measure the similarity of experts, which says how well one replaces another.",
)
def trace(
    model: str, out: Path, text: tuple[Path, ...], tokens: int, window: int, similarity: bool, expert_similarity: bool
) -> None:
    """Record which experts a model's gates choose.

    MODEL is the folder of a Mixture-of-Experts checkpoint, or the word default. The model reads text on this machine.
    The file OUT (.npz) gets the scores and choices of every gate, and no text. Simulations replay it.

    \b
    Examples:
      wdmoe-node trace default gate.npz
      wdmoe-node trace ./OLMoE-1B-7B olmoe.npz --text book.txt --tokens 4096
      wdmoe-node trace default gate.npz --expert-similarity    # for replacing far experts by near ones
    """
    with needs_extra("bs"):
        from wdmoe.backbone.default.model import default_checkpoint
        from wdmoe.backbone.record_trace import record_trace
    from wdmoe.cli.progress import StageProgress

    with StageProgress("trace") as progress:
        folder = default_checkpoint(progress.reach) if model == "default" else Path(model)
        made = record_trace(
            folder, text, tokens, window, similarity, progress.reach, expert_similarity=expert_similarity
        )
    made.save(out)
    layers, count, experts = made.gate.shape
    size = format_quantity(out.stat().st_size, "size")
    click.echo(f"{out}: {made.model}, {count} tokens through {layers} layers of {experts} experts, {size}")
