"""Export at its borders: reproducible, resumable, and plain about what it cannot take."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.lab import families
from tests.lab.command import fails, run_here
from tests.lab.full_disk import PAGE, fill, small_disk
from tests.lab.waiting import PATIENCE_S
from wdmoe.backbone.export import resume, shards
from wdmoe.backbone.export.export import ExportSettings, export_bundle
from wdmoe.backbone.export.resume import JOURNAL_NAME, Journal
from wdmoe.backbone.format.bundle import MANIFEST_NAME, Bundle
from wdmoe.backbone.format.onnx_graph import run_graph
from wdmoe.backbone.runtime.station import experts_modules, load_station
from wdmoe.errors import BundleError, ConfigError
from wdmoe.moe.verification.norm_band import ABOVE, BELOW


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A checkpoint to export; tests must not change it."""
    return families.save_tiny("mixtral", tmp_path_factory.mktemp("source") / "tiny-mixtral")


@pytest.fixture
def spoilt(tmp_path):
    """A checkpoint to spoil."""
    return families.save_tiny("mixtral", tmp_path / "spoilt", num_hidden_layers=1)


def contents(folder: Path):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def refused(model, out, match):
    with pytest.raises(BundleError, match=match) as caught:
        export_bundle(model, out, ExportSettings())
    assert "\n" not in str(caught.value)
    assert not (out / MANIFEST_NAME).exists()


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_exporting_twice_gives_the_same_bytes(source, tmp_path, precision):
    settings = ExportSettings(precision=precision)
    first = export_bundle(source, tmp_path / "a", settings)
    second = export_bundle(source, tmp_path / "b", settings)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert first == second == Bundle.open(tmp_path / "a").manifest
    assert first.model == "tiny-mixtral"
    assert str(tmp_path).encode() not in b"".join(contents(tmp_path / "a").values())


@pytest.mark.parametrize("family", families.FAMILIES)
def test_bounds_hold_what_experts_give(family, tmp_path):
    """Of inputs as the layer's own norm makes them; each is a power of two, whatever the machine's last digits."""
    source = families.save_tiny(family, tmp_path / "model")
    manifest = export_bundle(source, tmp_path / "bundle", ExportSettings())
    model = families.reference(source)
    seen = {}
    for layer, module in experts_modules(model).items():
        module.register_forward_hook(lambda module, inputs, output, at=layer: seen.setdefault(at, inputs[0]))
    with torch.no_grad():
        model(torch.arange(40, 60)[None])
    for file in manifest.experts:
        low, high = file.output_norm
        assert {np.frexp(each)[0] for each in (low, high)} == {0.5}
        x = seen[file.id.layer].numpy().astype(np.float32).reshape(-1, manifest.hidden)
        norms = np.linalg.norm(run_graph((tmp_path / "bundle" / file.path).read_bytes(), x), axis=1)
        assert BELOW * low < norms.min()
        assert norms.max() < ABOVE * high


def test_narrow_precision_makes_smaller_experts(source, tmp_path):
    sizes = {}
    for precision in ("fp32", "fp16", "int8"):
        manifest = export_bundle(source, tmp_path / precision, ExportSettings(precision=precision))
        sizes[precision] = sum(file.weight_bytes for file in manifest.experts)
        assert {file.flops_per_token for file in manifest.experts} == {2 * 3 * 32 * 48}
    assert sizes["fp32"] == 2 * sizes["fp16"]
    assert sizes["int8"] < 0.3 * sizes["fp32"]


def test_bf16_checkpoint_keeps_its_station_and_widens_its_experts(tmp_path):
    source = families.save_tiny("granitemoeshared", tmp_path / "model", dtype=torch.bfloat16)
    manifest = export_bundle(source, tmp_path / "bundle", ExportSettings())
    weights = load_file(tmp_path / "bundle/station/station.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert not any(".experts." in name for name in weights)
    assert manifest.experts[0].weight_bytes == 4 * 3 * 32 * 48


def test_shards_make_no_difference(source, tmp_path, monkeypatch):
    """A checkpoint in many files gives the same experts, and a station in many files the same weights."""
    whole = export_bundle(source, tmp_path / "whole", ExportSettings())
    sharded = tmp_path / "sharded"
    families.reference(source).save_pretrained(sharded, max_shard_size="20KB")
    families.save_tiny_tokenizer(sharded)
    assert len(list(sharded.glob("*.safetensors"))) > 3
    monkeypatch.setattr(shards, "_SHARD_BYTES", 20_000)
    parts = export_bundle(sharded, tmp_path / "parts", ExportSettings())
    assert [file.sha256 for file in parts.experts] == [file.sha256 for file in whole.experts]
    weights = [load_file(path) for path in Bundle.open(tmp_path / "parts").station_weights()]
    assert len(weights) > 3
    assert weights[0].keys().isdisjoint(weights[1])
    joined = {name: tensor for part in weights for name, tensor in part.items()}
    expected = load_file(tmp_path / "whole/station/station.safetensors")
    assert joined.keys() == expected.keys()
    assert all(torch.equal(joined[name], expected[name]) for name in expected)
    assert load_station(Bundle.open(tmp_path / "parts"), device="cpu").manifest == parts


def test_progress_counts_every_byte(source, tmp_path):
    class Counter:
        total = done = 0

        def start(self, total_bytes):
            self.total = total_bytes

        def advance(self, source_bytes, what):
            assert what
            self.done += source_bytes

    counter = Counter()
    export_bundle(source, tmp_path / "bundle", ExportSettings(), counter)
    assert counter.done == counter.total > 0


class Stop(Exception):
    """Raised in the middle of an export."""


class StopAfter:
    """Lets some pieces of work through, then interrupts."""

    def __init__(self, pieces, error):
        self.left, self.error = pieces, error

    def start(self, total_bytes):
        pass

    def advance(self, source_bytes, what):
        self.left -= 1
        if self.left < 0:
            raise self.error


@pytest.mark.parametrize("pieces", [0, 1, 2, 3])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), Stop()])
def test_interrupted_export_goes_on_where_it_stopped(source, tmp_path, pieces, error):
    whole = export_bundle(source, tmp_path / "whole", ExportSettings())
    out = tmp_path / "cut"
    with pytest.raises(type(error)):
        export_bundle(source, out, ExportSettings(), StopAfter(pieces, error))
    assert not (out / MANIFEST_NAME).exists()
    with pytest.raises(BundleError, match="not a bundle"):
        Bundle.open(out)
    kept = {path: (out / path).stat().st_mtime_ns for path in contents(out) if path.endswith(".onnx")}
    assert len(kept) == 8 * pieces
    assert export_bundle(source, out, ExportSettings()) == whole
    assert contents(out) == contents(tmp_path / "whole")
    assert all((out / path).stat().st_mtime_ns == stamp for path, stamp in kept.items())  # not made again


def test_file_damaged_between_two_runs_is_made_again(source, tmp_path):
    out = tmp_path / "cut"
    with pytest.raises(Stop):
        export_bundle(source, out, ExportSettings(), StopAfter(2, Stop()))
    (out / "experts/000/002.onnx").write_bytes(b"half a file")
    with (out / JOURNAL_NAME).open("a") as stream:
        stream.write('{"path": "experts/000/0')  # the line being written when the power went
    export_bundle(source, out, ExportSettings())
    Bundle.open(out).verify()


def test_killed_export_goes_on(source, tmp_path):
    out = tmp_path / "killed"
    code = (
        "import sys; from pathlib import Path; from wdmoe.backbone.export.export import *;"
        "export_bundle(Path(sys.argv[1]), Path(sys.argv[2]), ExportSettings())"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen([sys.executable, "-c", code, str(source), str(out)], env=environment)
    give_up = time.monotonic() + PATIENCE_S
    while not (out / "experts/000/001.onnx").exists() and process.poll() is None:
        assert time.monotonic() < give_up
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    if (out / MANIFEST_NAME).exists():
        pytest.skip("the export was faster than the kill")
    export_bundle(source, out, ExportSettings())
    Bundle.open(out).verify()


def test_half_finished_export_of_something_else_is_refused(source, tmp_path):
    with pytest.raises(Stop):
        export_bundle(source, tmp_path / "out", ExportSettings(), StopAfter(1, Stop()))
    with pytest.raises(BundleError, match="half-finished export of something else"):
        export_bundle(source, tmp_path / "out", ExportSettings(precision="int8"))


def test_two_exports_into_one_folder_are_refused(source, tmp_path):
    class Second:
        def start(self, total_bytes):
            pass

        def advance(self, source_bytes, what):
            with pytest.raises(BundleError, match="by another export"):
                export_bundle(source, tmp_path / "out", ExportSettings())

    export_bundle(source, tmp_path / "out", ExportSettings(), Second())
    Bundle.open(tmp_path / "out").verify()


def test_folder_that_is_not_empty_is_refused(source, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/letter.txt").write_text("keep me")
    refused(source, tmp_path / "out", "not empty")
    assert (tmp_path / "out/letter.txt").read_text() == "keep me"


def test_full_disk_is_one_line_and_can_be_resumed(source, tmp_path):
    """A real refusal by the kernel, at a file-size limit: the same path through the code as a full disk."""
    out = tmp_path / "full"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (18_000, before[1]))
        with pytest.raises(BundleError, match="cannot write") as caught:
            export_bundle(source, out, ExportSettings())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert "\n" not in str(caught.value)
    assert not list(out.rglob("*.part"))
    export_bundle(source, out, ExportSettings())
    Bundle.open(out).verify()


# Room for: nothing, the journal alone, some of the station's files, some of the experts.
@pytest.mark.parametrize("pages", [0, 1, 12, 100])
def test_disk_without_room_leaves_nothing_to_trust(source, tmp_path, pages):
    whole = export_bundle(source, tmp_path / "whole", ExportSettings())
    with small_disk(tmp_path / "small") as disk:
        out, filler = disk / "bundle", fill(disk, pages * PAGE)
        refused(source, out, "disk is full")
        assert not list(out.rglob("*.part"))
        with pytest.raises(BundleError, match="is not a bundle"):
            Bundle.open(out)
        filler.unlink()
        assert export_bundle(source, out, ExportSettings()) == whole
        assert contents(out) == contents(tmp_path / "whole")


def test_export_command_on_a_full_disk_is_one_line(source, tmp_path):
    with small_disk(tmp_path / "small") as disk:
        fill(disk, 12 * PAGE)
        line = fails(run_here("export", str(source), str(disk / "bundle")))
    assert "disk is full" in line
    assert "run the same command again" in line


def test_disk_that_is_full_at_a_line_of_the_journal(tmp_path):
    with small_disk(tmp_path / "small") as disk:
        with Journal(disk / "bundle", "work") as journal:
            filler = fill(disk)
            with pytest.raises(BundleError, match="disk is full"):
                journal.write("empty", [], note="x" * PAGE)  # the file needs no room, its line does
        filler.unlink()
        with Journal(disk / "bundle", "work") as journal:
            assert journal.finished("empty") is None
            journal.write("empty", [])
        with Journal(disk / "bundle", "work") as journal:
            assert journal.finished("empty") is not None


def test_disk_full_says_what_to_do(tmp_path):
    with pytest.raises(BundleError, match="disk is full") as caught, resume._disk(tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert "run the same command again" in str(caught.value)


def test_folder_without_a_checkpoint_is_refused(tmp_path):
    refused(tmp_path / "none", tmp_path / "out", "not a folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", tmp_path / "out", "no config.json")
    assert not (tmp_path / "out").exists()


def test_pickled_weights_are_refused(spoilt, tmp_path):
    (spoilt / "model.safetensors").rename(spoilt / "pytorch_model.bin")
    refused(spoilt, tmp_path / "out", "convert them to safetensors")


def test_no_weights_are_refused(spoilt, tmp_path):
    (spoilt / "model.safetensors").unlink()
    refused(spoilt, tmp_path / "out", "neither model.safetensors nor")


def test_missing_shard_is_named(spoilt, tmp_path):
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model.safetensors"}}
    (spoilt / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(spoilt, tmp_path / "out", r"lacks 1 of 2 weight files, first model-1\.safetensors")


def test_shard_outside_of_the_folder_is_refused(spoilt, tmp_path):
    index = {"weight_map": {"a": "../model.safetensors"}}
    (spoilt / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(spoilt, tmp_path / "out", "plain file names")


@pytest.mark.parametrize("size", [3, 200, -100])
def test_truncated_shard_is_refused(spoilt, tmp_path, size):
    file = spoilt / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    refused(spoilt, tmp_path / "out", "truncated")


def test_quantised_checkpoint_is_refused(spoilt, tmp_path):
    config = json.loads((spoilt / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (spoilt / "config.json").write_text(json.dumps(config))
    refused(spoilt, tmp_path / "out", "mixtral: the checkpoint is quantised")


def test_missing_tensor_is_named(spoilt, tmp_path):
    tensors = load_file(spoilt / "model.safetensors")
    tensors.pop("model.norm.weight")
    save_file(tensors, spoilt / "model.safetensors")
    refused(spoilt, tmp_path / "out", r"'model\.norm\.weight'")


def test_missing_expert_is_refused(spoilt, tmp_path):
    tensors = load_file(spoilt / "model.safetensors")
    tensors.pop("model.layers.0.block_sparse_moe.experts.3.w1.weight")
    save_file(tensors, spoilt / "model.safetensors")
    refused(spoilt, tmp_path / "out", "gate_up_proj")


def test_expert_that_is_not_a_number_is_refused(spoilt, tmp_path):
    tensors = load_file(spoilt / "model.safetensors")
    tensors["model.layers.0.block_sparse_moe.experts.0.w1.weight"][0, 0] = torch.nan
    save_file(tensors, spoilt / "model.safetensors")
    refused(spoilt, tmp_path / "out", "mixtral")


def test_config_that_disagrees_with_the_weights_is_refused(spoilt, tmp_path):
    config = json.loads((spoilt / "config.json").read_text())
    config["intermediate_size"] = 64
    (spoilt / "config.json").write_text(json.dumps(config))
    refused(spoilt, tmp_path / "out", r"gate_up_proj' has shape \(8, 96, 32\)")


def test_missing_tokenizer_is_refused(spoilt, tmp_path):
    (spoilt / "tokenizer.json").unlink()
    refused(spoilt, tmp_path / "out", "no tokenizer")


def test_dense_model_is_sent_to_split(tmp_path):
    config = families.transformers.LlamaConfig(
        vocab_size=260, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    families.tiny_model(config).save_pretrained(tmp_path / "dense")
    families.save_tiny_tokenizer(tmp_path / "dense")
    refused(tmp_path / "dense", tmp_path / "out", "llama: .*wdmoe-node split")


def test_model_type_that_transformers_does_not_know_is_refused(spoilt, tmp_path):
    (spoilt / "config.json").write_text('{"model_type": "no_such_family"}')
    refused(spoilt, tmp_path / "out", "config.json")


def test_wdmoe_settings_of_the_checkpoint_win(spoilt, tmp_path):
    config = json.loads((spoilt / "config.json").read_text())
    config["wdmoe"] = {"on_drop": "keep", "gate_temperature": 0.5, "rank": "energy"}
    (spoilt / "config.json").write_text(json.dumps(config))
    manifest = export_bundle(spoilt, tmp_path / "out", ExportSettings())
    assert (manifest.on_drop, manifest.gate_temperature, manifest.rank) == ("keep", 0.5, "energy")


def test_a_rank_that_is_none_is_refused(spoilt, tmp_path):
    config = json.loads((spoilt / "config.json").read_text())
    config["wdmoe"] = {"rank": "luck"}
    (spoilt / "config.json").write_text(json.dumps(config))
    refused(spoilt, tmp_path / "out", "'wdmoe.rank' must be one of probability, energy")


def test_unknown_precision_is_refused():
    with pytest.raises(ConfigError, match="fp32, fp16, int8"):
        ExportSettings(precision="fp8")
