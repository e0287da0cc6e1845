"""The model card of the default model: what it was made of, and what was measured when it was decided."""

from __future__ import annotations

from wdmoe.backbone.split.decisions import Decisions
from wdmoe.backbone.split.dense import DenseModel


def decided_card(source: DenseModel, decisions: Decisions) -> str:
    """README.md of the checkpoint: source, licence, hashes, and the figures that the decisions carry."""
    licence, figures = source.licence or "unknown", decisions.figures
    rows = "\n".join(f"| {name} | {value} |" for name, value in figures.items())
    return f"""---
license: {licence}
library_name: transformers
tags: [mixture-of-experts, wdmoe]
---
# {source.name}, split into experts

Made by wdmoe from the dense model {source.name} and a file of decisions that ships with wdmoe: which neurons go into
which expert, the routers, and low-rank corrections of the weights, trained once so that the split model answers as the
dense model does. In every layer {decisions.experts} experts, of which {decisions.top_k} are computed per token, beside
a shared MLP.

| | |
| --- | --- |
| source | {source.name}, SHA-256 of the file `{source.sha256}` |
| licence | {licence} (as the source) |
| decisions | SHA-256 of the file `{decisions.digest}` |
{rows}

Perplexities were measured when the decisions were made, not when this folder was. Gate weights are near uniform on
purpose. `wdmoe.gate_temperature` in `config.json` recovers the scale that ranks experts
(`softmax(logits / gate_temperature)`), and their squares rank them better still (`wdmoe.rank`); when an expert is
dropped the others keep their weight (`wdmoe.on_drop`).
"""
