"""Loading the station: no expert weight is ever in its memory, and damaged station files are refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.lab import families
from wdmoe.backbone.export.export import ExportSettings, export_bundle
from wdmoe.backbone.format.bundle import Bundle
from wdmoe.backbone.runtime.station import experts_modules, load_station, router_of
from wdmoe.errors import BundleError, ConfigError

# Experts of 96 MB beside a station of under 1 MB; the child may grow by a fraction of that while loading.
WIDE = {"intermediate_size": 8192, "num_local_experts": 8, "num_hidden_layers": 4}
ROOM_BYTES = 24 << 20
CHILD = """
import resource, sys
from wdmoe.backbone.format.bundle import Bundle
from wdmoe.backbone.runtime.station import load_station
load_station(Bundle.open(sys.argv[1]), device="cpu")   # imports and lazily made state
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
station = load_station(Bundle.open(sys.argv[2]), device="cpu")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def export(folder: Path, family: str = "mixtral", **overrides):
    source = families.save_tiny(family, folder / "model", **overrides)
    export_bundle(source, folder / "bundle", ExportSettings())
    return folder / "bundle"


def test_expert_weights_are_never_in_memory(tmp_path):
    small = export(tmp_path / "small")
    wide = export(tmp_path / "wide", **WIDE)
    experts = sum(file.weight_bytes for file in Bundle.open(wide).manifest.experts)
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(small), str(wide)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert experts >= 4 * ROOM_BYTES
    assert int(done.stdout.splitlines()[-1]) < ROOM_BYTES


def test_only_the_experts_are_on_the_meta_device(tmp_path):
    station = load_station(Bundle.open(export(tmp_path, "deepseek_v3")), device="cpu")
    of_experts = {id(p) for module in station.experts.values() for p in module.parameters()}
    for name, tensor in (*station.model.named_parameters(), *station.model.named_buffers()):
        assert tensor.is_meta == (id(tensor) in of_experts), name
        assert not tensor.requires_grad
    assert tuple(station.experts) == (1, 2)  # layer 0 is dense
    assert station.experts == experts_modules(station.model)
    assert station.routers[2] is router_of(station.model, 2)
    assert not station.model.training
    assert station.tokenizer.decode(station.tokenizer("Grüße!")["input_ids"]) == "Grüße!"


def test_tied_embeddings_stay_one_tensor(tmp_path):
    bundle = export(tmp_path, "granitemoeshared")
    station = load_station(Bundle.open(bundle), device="cpu")
    assert station.model.lm_head.weight is station.model.model.embed_tokens.weight
    weights = load_file(bundle / "station/station.safetensors")
    assert ("lm_head.weight" in weights) + ("model.embed_tokens.weight" in weights) == 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype_is_as_asked(tmp_path, dtype):
    station = load_station(Bundle.open(export(tmp_path, "deepseek_v3")), device="cpu", dtype=dtype)
    kinds = {p.dtype for p in station.model.parameters() if not p.is_meta}
    assert kinds == {getattr(torch, dtype)}
    assert station.dtype == getattr(torch, dtype)
    bias = station.routers[1].e_score_correction_bias
    assert bias.dtype == torch.float32  # the family keeps it so


def test_generation_config_of_the_checkpoint_is_kept(tmp_path):
    source = families.save_tiny("mixtral", tmp_path / "model", num_hidden_layers=1)
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [257, 7]}))
    export_bundle(source, tmp_path / "bundle", ExportSettings())
    station = load_station(Bundle.open(tmp_path / "bundle"), device="cpu")
    assert station.model.generation_config.eos_token_id == [257, 7]


def test_loading_leaves_the_experts_class_as_it_was(tmp_path):
    bundle = Bundle.open(export(tmp_path))
    load_station(bundle, device="cpu")
    model = families.tiny_model(families.tiny_config("mixtral"))
    assert not any(p.is_meta for p in model.parameters())


def resave(bundle: Path, change):
    """Change the station's tensors and make size and nothing else agree: hashes are `verify`'s business."""
    path = bundle / "station/station.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    manifest = json.loads((bundle / "manifest.json").read_text())
    for entry in manifest["station"]:
        entry["size"] = (bundle / entry["path"]).stat().st_size
    (bundle / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.pop("model.norm.weight"), r"lacks 'model\.norm\.weight'"),
        (lambda t: t.update({"strange": torch.zeros(1)}), "'strange', which has no place"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(3)}), "shape"),
        (
            lambda t: t.update({"model.layers.0.mlp.experts.down_proj": torch.zeros(8, 32, 48)}),
            "experts.down_proj', which has no place",
        ),
    ],
)
def test_station_that_does_not_make_up_the_model_is_refused(tmp_path, change, match):
    bundle = export(tmp_path)
    resave(bundle, change)
    with pytest.raises(BundleError, match=match):
        load_station(Bundle.open(bundle), device="cpu")


def test_damaged_station_file_is_refused(tmp_path):
    bundle = export(tmp_path)
    path = bundle / "station/station.safetensors"
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(BundleError, match="damaged"):
        load_station(Bundle.open(bundle), device="cpu")


@pytest.mark.parametrize(("device", "dtype"), [("nowhere", "auto"), ("cpu", "float8"), ("cuda:99", "auto")])
def test_impossible_place_is_refused(tmp_path, device, dtype):
    with pytest.raises(ConfigError):
        load_station(Bundle.open(export(tmp_path)), device=device, dtype=dtype)
