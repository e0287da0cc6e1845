"""Experts in real ONNX Runtime sessions against what they should compute."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from onnx import helper

from tests.lab.expert_files import ExpertFile, constant_expert, make_expert, model_bytes
from wdmoe.errors import ConfigError, ExpertError
from wdmoe.moe.expert import ExpertRunner
from wdmoe.moe.providers import OnnxExpert, TensorRtSite, choose_provider, cpu_chain, tensorrt_chain
from wdmoe.records import ExpertId
from wdmoe.transport.codec.messages import Run

HIDDEN = 16
FLOAT32_TOLERANCE, FLOAT16_TOLERANCE = 1e-5, 2e-3


def open_on_cpu(model: bytes, _sha256: str) -> OnnxExpert:
    return OnnxExpert(model, 1, cpu_chain())


@pytest.fixture
def experts(rng) -> list[ExpertFile]:
    return [make_expert(rng, HIDDEN) for _ in range(4)]


@pytest.fixture
def runner(experts) -> ExpertRunner:
    runner = ExpertRunner(open_on_cpu)
    for number, expert in enumerate(experts):
        runner.load(ExpertId(3, number), expert.data, expert.sha256, HIDDEN)
    return runner


def a_run(tokens, served: dict[int, list[int]], weights, layer: int = 3) -> Run:
    return Run(
        attempt=7,
        layer=layer,
        remaining_s=1.0,
        experts=tuple(served),
        counts=tuple(len(rows) for rows in served.values()),
        tokens=tokens,
        rows=np.array([row for rows in served.values() for row in rows], np.int32),
        weights=np.asarray(weights, np.float32),
    )


def expected(experts, run: Run):
    total, start = np.zeros(run.tokens.shape, np.float64), 0
    for number, count in zip(run.experts, run.counts, strict=True):
        for row, weight in zip(run.rows[start : start + count], run.weights[start : start + count], strict=True):
            total[row] += float(weight) * experts[number].apply(run.tokens[row : row + 1])[0]
        start += count
    return total


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize(
    ("tokens", "served"),
    [
        (1, {2: [0]}),
        (1, {0: [0], 3: [0]}),
        (1, {0: [0, 0]}),  # nobody asks that, but it has an answer
        (5, {1: [4, 0, 2], 0: [2], 3: [0, 1, 2, 3, 4]}),
        (3, {1: [1]}),  # rows nobody serves stay zero
        (700, {0: list(range(700)), 2: list(range(0, 700, 3))}),
    ],
)
def test_partial_sum_is_the_weighted_sum(runner, experts, rng, tokens, served, dtype):
    run = a_run(
        rng.standard_normal((tokens, HIDDEN)).astype(dtype),
        served,
        rng.random(sum(map(len, served.values()))),
    )
    partial = runner.run(run)
    tolerance = FLOAT32_TOLERANCE if dtype is np.float32 else FLOAT16_TOLERANCE
    assert partial.dtype == dtype
    np.testing.assert_allclose(partial, expected(experts, run), rtol=tolerance, atol=tolerance)


def test_a_partial_survives_the_next_run(runner, experts, rng):
    runs = [a_run(rng.standard_normal((1, HIDDEN)).astype(np.float32), {0: [0]}, [1.0]) for _ in range(3)]
    partials = [runner.run(run) for run in runs]
    for run, partial in zip(runs, partials, strict=True):
        np.testing.assert_allclose(partial, expected(experts, run), rtol=1e-5, atol=1e-6)


def test_loads_replaces_and_unloads(runner, experts, rng):
    other, run = make_expert(rng, HIDDEN), a_run(np.ones((1, HIDDEN), np.float32), {0: [0]}, [1.0])
    runner.load(ExpertId(3, 0), other.data, other.sha256, HIDDEN)
    assert runner.loaded()[ExpertId(3, 0)] == other.sha256
    np.testing.assert_allclose(runner.run(run), other.apply(run.tokens), rtol=1e-5, atol=1e-6)
    runner.unload(ExpertId(3, 0))
    runner.unload(ExpertId(3, 0))
    assert ExpertId(3, 0) not in runner.loaded()
    with pytest.raises(ExpertError, match="layer 3 expert 0 isn't loaded here"):
        runner.run(run)


def test_refuses_tokens_of_another_width(runner):
    with pytest.raises(ExpertError, match="takes tokens of width 16, got 8"):
        runner.run(a_run(np.ones((1, 8), np.float32), {0: [0]}, [1.0]))


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("rows", [[-1], [3]])
def test_refuses_rows_that_are_not_there(runner, tokens, rows):
    with pytest.raises(ExpertError, match="doesn't carry"):
        runner.run(a_run(np.ones((tokens, HIDDEN), np.float32), {0: rows}, [1.0] * len(rows)))


@pytest.mark.parametrize("change", [{"counts": (2,)}, {"counts": ()}, {"experts": (), "counts": ()}, {"counts": (0,)}])
def test_refuses_lists_that_do_not_match(runner, change):
    run = a_run(np.ones((1, HIDDEN), np.float32), {0: [0]}, [1.0])
    with pytest.raises(ExpertError, match=r"don't match|without tokens"):
        runner.run(dataclasses.replace(run, **change))


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_never_answers_with_what_is_not_finite(runner, tokens, value, weight):
    runner.load(ExpertId(3, 9), constant_expert(HIDDEN, value), "00", HIDDEN)
    rows = list(range(tokens))
    weights = [1.0] * tokens + [weight] * tokens
    run = a_run(np.ones((tokens, HIDDEN), np.float32), {0: rows, 9: rows}, weights)
    with pytest.raises(ExpertError, match="experts 0, 9 isn't finite"):
        runner.run(run)


def test_a_huge_finite_sum_passes_and_one_too_large_for_float16_does_not(runner):
    runner.load(ExpertId(3, 9), constant_expert(HIDDEN, 1e30), "00", HIDDEN)
    assert runner.run(a_run(np.ones((1, HIDDEN), np.float32), {9: [0]}, [1.0]))[0, 0] == np.float32(1e30)
    with pytest.raises(ExpertError, match="doesn't fit float16"):
        runner.run(a_run(np.ones((1, HIDDEN), np.float16), {9: [0]}, [1.0]))


NEG = helper.make_node("Neg", ["x"], ["y"])


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (b"", "can't open an expert"),
        (b"not a model", "can't open an expert"),
        (model_bytes([helper.make_node("Neg", ["x"], ["z"])], [], HIDDEN, output="z"), "one output y"),
        (model_bytes([NEG], [], "wide"), "fixed width"),
        (model_bytes([NEG], [], HIDDEN, tokens=1), "any number of tokens"),
        (model_bytes([NEG], [], 32), "is 32 wide, its placement says 16"),
    ],
)
def test_refuses_files_that_are_no_expert(runner, model, reason):
    with pytest.raises(ExpertError, match=reason):
        runner.load(ExpertId(3, 5), model, "00", HIDDEN)
    assert ExpertId(3, 5) not in runner.loaded()


def test_auto_takes_what_works_here(rng):
    assert choose_provider("auto", make_expert(rng).data) == "cpu"
    assert choose_provider("cpu", make_expert(rng).data) == "cpu"


@pytest.mark.skipif(
    "CUDAExecutionProvider" in ort.get_available_providers(), reason="this machine has what the test asks for"
)
@pytest.mark.parametrize("wanted", ["cuda", "tensorrt"])
def test_a_provider_that_is_missing_is_named_with_its_package(rng, wanted):
    with pytest.raises(ConfigError, match=rf"--provider {wanted} .*installed: cpu.*onnxruntime-gpu"):
        choose_provider(wanted, make_expert(rng).data)


def test_tensorrt_keeps_private_engines_per_file_and_board(tmp_path: Path):
    site = TensorRtSite(folder=tmp_path / "engines", fingerprint="orin-1.23")
    (name, options), *rest = tensorrt_chain(site, "ab" * 32, 576)
    assert name == "TensorrtExecutionProvider"
    assert [fallback for fallback, _ in rest] == ["CUDAExecutionProvider", "CPUExecutionProvider"]
    assert options["trt_fp16_enable"] == "1"
    assert options["trt_engine_cache_prefix"] == "ab" * 32
    assert options["trt_profile_min_shapes"] == "x:1x576"
    folder = Path(options["trt_engine_cache_path"])
    assert folder == tmp_path / "engines" / "orin-1.23"
    assert folder.stat().st_mode & 0o777 == 0o700


def test_an_engine_folder_that_cannot_be_made_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ExpertError, match=r"engine folder .*file/engines/orin"):
        tensorrt_chain(TensorRtSite(folder=tmp_path / "file" / "engines", fingerprint="orin"), "ab" * 32, 576)


def test_a_device_needs_neither_torch_nor_onnx():
    heavy = "{'torch', 'transformers', 'onnx'}"
    code = f"import sys, wdmoe.moe.expert, wdmoe.moe.providers; sys.exit(str({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "set()"


MEASURE = """
import sys
import psutil
from pathlib import Path
from wdmoe.heap import return_memory
from wdmoe.moe.expert import ExpertRunner
from wdmoe.moe.providers import OnnxExpert, cpu_chain
from wdmoe.records import ExpertId
file, process = Path(sys.argv[1]), psutil.Process()
runner = ExpertRunner(lambda model, sha256: OnnxExpert(model, 1, cpu_chain()))
before = process.memory_info().rss
for number in range(20):
    runner.load(ExpertId(0, number), file.read_bytes(), "00", 256)
return_memory()
print((process.memory_info().rss - before) / (20 * file.stat().st_size))
"""


def test_loaded_experts_take_little_more_than_their_weights(tmp_path: Path, rng):
    (tmp_path / "expert.onnx").write_bytes(make_expert(rng, 256, 4096).data)  # 12 MiB
    command = [sys.executable, "-c", MEASURE, tmp_path / "expert.onnx"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1.3  # 2 and more where the runtime keeps the file beside what it made of it
