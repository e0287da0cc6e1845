"""The shared expert is computed ahead where the family asks for it after the others, and never twice for nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.lab.families import reference, save_tiny
from wdmoe.arrays import Float32Array
from wdmoe.backbone.families import experts_modules
from wdmoe.backbone.runtime.experts_seam import CURRENT_LEDGER, attach
from wdmoe.layer_call import LayerCall
from wdmoe.receipt import Ledger


@pytest.mark.parametrize(
    ("family", "useful"),
    [("granitemoeshared", True), ("deepseek_v3", True), ("glm4_moe", True), ("qwen2_moe", False), ("mixtral", None)],
)
def test_computed_ahead_where_it_is_of_use(family: str, useful: bool | None, tmp_path: Path) -> None:
    checkpoint = save_tiny(family, tmp_path)
    ids = torch.arange(40, 60)[None]
    with torch.no_grad():
        want = reference(checkpoint)(ids).logits
    model, twin = reference(checkpoint), reference(checkpoint)
    experts, locals_ = experts_modules(model), experts_modules(twin)
    ahead = []

    def run(call: LayerCall) -> Float32Array:
        if call.meanwhile is not None:
            ahead.append(call.layer)
            call.meanwhile()
        arrays = (torch.from_numpy(a) for a in (call.tokens, call.demand.experts, call.demand.weights))
        hidden, index, gates = arrays
        return np.asarray(locals_[call.layer](hidden, index.long(), gates).numpy())

    attach(model, experts, {}, run)
    CURRENT_LEDGER.set(Ledger())
    with torch.inference_mode():
        for _ in range(2):
            ahead.clear()
            torch.testing.assert_close(model(ids).logits, want, atol=1e-5, rtol=0)
    assert (ahead == list(experts)) is bool(useful)
