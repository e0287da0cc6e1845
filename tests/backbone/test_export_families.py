"""Every family of the list: exported, loaded without experts, computed with ONNX Runtime."""

import pytest
import torch

from tests.lab import families
from wdmoe.backbone.export.export import ExportSettings, export_bundle
from wdmoe.backbone.format.bundle import Bundle
from wdmoe.backbone.runtime.station import load_station

LOGITS_TOLERANCE = 1e-4
NORMALISING = {
    "mixtral",
    "qwen3_moe",
    "granitemoeshared",
    "deepseek_v3",
    "gpt_oss",
    "ernie4_5_moe",
    "glm4_moe",
}


@pytest.mark.parametrize("family", families.FAMILIES)
def test_divided_model_gives_the_undivided_models_logits(family, tmp_path):
    source = families.save_tiny(family, tmp_path / "model")
    manifest = export_bundle(source, tmp_path / "bundle", ExportSettings())
    bundle = Bundle.open(tmp_path / "bundle")
    bundle.verify()
    station = load_station(bundle, device="cpu")
    tokens = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), families.local_implementation(bundle, station):
        divided = station.model(tokens).logits
    with torch.no_grad():
        undivided = families.reference(source)(tokens).logits

    assert undivided.abs().max() > 1  # the comparison has something to compare
    assert (divided - undivided).abs().max() < LOGITS_TOLERANCE
    assert manifest.family == family
    if family != "phimoe":  # its weights sum to almost the same number, and either answer is good
        assert manifest.on_drop == ("renormalise" if family in NORMALISING else "keep")


@pytest.mark.parametrize("family", families.FAMILIES)
def test_router_gives_the_gate_row_first(family, tmp_path):
    source = families.save_tiny(family, tmp_path / "model")
    export_bundle(source, tmp_path / "bundle", ExportSettings(precision="fp16"))
    bundle = Bundle.open(tmp_path / "bundle")
    station = load_station(bundle, device="cpu")
    rows = {}
    for layer, router in station.routers.items():
        router.register_forward_hook(lambda module, args, output, layer=layer: rows.update({layer: output}))
    with torch.no_grad(), families.local_implementation(bundle, station):
        station.model(torch.arange(10)[None])
    for layer, experts in bundle.manifest.experts_per_layer.items():
        logits, weights, index = rows[layer][:3]
        assert logits.shape == (10, experts)
        assert weights.shape == index.shape == (10, bundle.manifest.top_k)
