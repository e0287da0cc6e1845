"""What decisions cost a model: experts run as planned, likelihoods, intervals, and the tools around them."""

from __future__ import annotations

import inspect
import json
import math
import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from tests.lab.families import reference, save_tiny, tiny_config, tiny_model
from wdmoe.backbone.default.model import default_checkpoint
from wdmoe.backbone.evaluation.multiple_choice import Question, choice_nats, read_bigbench, read_questions, score
from wdmoe.backbone.evaluation.simulated_experts import EXACT, Order, PlannedExperts, travelled
from wdmoe.backbone.perplexity import window_nats, window_perplexity
from wdmoe.backbone.record_trace import record_trace
from wdmoe.errors import ConfigError, MissingExtraError
from wdmoe.simulation.quality import measure, qualities, with_baseline
from wdmoe.simulation.results import verify_results
from wdmoe.simulation.scenario import Scenario
from wdmoe.simulation.scenario_file import parse_scenario
from wdmoe.simulation.study import run_study
from wdmoe.solver.layer.latency import Levers

HALF = 2.0**-11  # relative error of one rounding to float16
IDS = torch.arange(24).reshape(2, 12) % 60


def everything(bits: int, **changes: Any) -> Any:
    """Computes all that the gate asks for, on two devices."""

    def decide(layer: int, experts: np.ndarray, ranks: np.ndarray) -> Order:
        used = np.where(experts >= 0, bits, 0).astype(np.int32)
        device = np.where(experts >= 0, experts % 2, -1).astype(np.int32)
        return Order(**{"experts": experts, "device": device, "down_bits": used, "up_bits": used, **changes})

    return decide


@pytest.fixture(scope="module", params=["mixtral", "granitemoeshared", "deepseek_v3", "gpt_oss"])
def model(request: pytest.FixtureRequest) -> Any:
    made = tiny_model(tiny_config(request.param))
    made.set_experts_implementation("eager")
    return made


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS, use_cache=False).logits


def test_a_plan_that_changes_nothing_is_the_model_itself(model: Any) -> None:
    plain = logits(model)
    with PlannedExperts(model, everything(EXACT)):
        assert torch.equal(logits(model), plain)
    assert model.get_experts_implementation()[""] == "eager"
    assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("partial_sums", [False, True])
def test_16_bits_are_float16(model: Any, partial_sums: bool) -> None:
    plain = logits(model)
    with PlannedExperts(model, everything(16, partial_sums=partial_sums)):
        rounded = logits(model)
    assert not torch.equal(rounded, plain)
    torch.testing.assert_close(rounded, plain, rtol=0, atol=8 * HALF * float(plain.abs().max()))


@pytest.mark.parametrize(("bits", "steps"), [(4, 7), (8, 127)])
def test_few_bits_are_that_many_steps(bits: int, steps: int) -> None:
    torch.manual_seed(0)
    vectors = torch.randn(5, 64) * torch.tensor([1e-3, 1.0, 30.0, 1e4, 0.0])[:, None]
    arrived = travelled(vectors, bits)
    top = vectors.abs().amax(1, keepdim=True)
    assert float(((arrived - vectors).abs() - top / steps * (0.5 + steps * HALF)).max()) <= 1e-6
    assert all(len(row.unique()) <= 2 * steps + 1 for row in arrived)


@pytest.mark.parametrize("renormalise", [False, True])
def test_what_is_dropped_is_not_computed_and_what_is_replaced_is_by_another(model: Any, renormalise: bool) -> None:
    def decide(layer: int, experts: np.ndarray, ranks: np.ndarray) -> Order:
        assert ((ranks > 0) & (ranks < 1)).all()
        wanted = experts.copy()
        wanted[:, 0] = (wanted[:, 0] + 1) % planned.expert_count  # another expert, perhaps a second time
        wanted[::2, 1] = -1
        return everything(EXACT)(layer, wanted, ranks)

    def reference(module: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        index, left = index.clone(), weights.clone()
        index[:, 0] = (index[:, 0] + 1) % planned.expert_count
        left[::2, 1] = 0
        if renormalise:
            left = left * weights.sum(1, keepdim=True) / left.sum(1, keepdim=True)
        alone = inspect.unwrap(type(module).forward)
        return sum(alone(module, hidden, index[:, [k]], left[:, [k]]) for k in range(index.shape[1]))

    planned = PlannedExperts(model, decide)
    planned.renormalise = renormalise
    with planned:
        found = logits(model)
    ALL_EXPERTS_FUNCTIONS.register("wdmoe-test", reference)
    model.set_experts_implementation("wdmoe-test")
    wanted = logits(model)
    model.set_experts_implementation("eager")
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_devices_with_different_bits_get_different_vectors() -> None:
    """One device at 4 bits is half of what both at 4 bits change."""
    made = tiny_model(tiny_config("granitemoeshared", num_hidden_layers=1))
    made.set_experts_implementation("eager")
    plain = logits(made)

    def error(first: int, second: int) -> float:
        def decide(layer: int, experts: np.ndarray, ranks: np.ndarray) -> Order:
            bits = np.where(experts % 2 == 0, first, second).astype(np.int32)
            return everything(0, down_bits=bits, up_bits=bits)(layer, experts, ranks)

        with PlannedExperts(made, decide):
            return float((logits(made) - plain).square().sum())

    assert error(EXACT, EXACT) == 0
    both, one, other = error(4, 4), error(4, EXACT), error(EXACT, 4)
    assert 0 < one < both
    assert 0 < other < both
    assert one + other == pytest.approx(both, rel=0.5)


TEXT = "".join(chr(97 + i * i % 23) for i in range(400))
WINDOW = 32
SCENARIO = """
name = "tiny"
draws = 2
[channel]
fading_changes = "layer"
[devices]
count = 3
experts = 6
[model]
trace = "{trace}"
hidden = 4096
inner = 512
tokens = 32
[[variant]]
name = "plain"
bandwidth = "equal"
[[variant]]
name = "hertz"
csi_layers = 0
[[variant]]
name = "coarse"
policy = "budget"
max_dropped = 0.3
bits = 4
multicast = true
partial_sums = true
placement = "greedy"
replicas = 2
least_similarity = -1
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, `text.txt`, and a `scenario.toml` with a trace of its first window."""
    folder = save_tiny("mixtral", tmp_path_factory.mktemp("tiny"))
    (folder / "text.txt").write_text(TEXT)
    trace = record_trace(folder, (folder / "text.txt",), WINDOW, WINDOW, False, lambda *_: None, expert_similarity=True)
    trace.save(folder / "trace.npz")
    (folder / "scenario.toml").write_text(SCENARIO.replace("{trace}", str(folder / "trace.npz")))
    return folder


@pytest.fixture(scope="module")
def scenario(tiny: Path) -> Scenario:
    return parse_scenario((tiny / "scenario.toml").read_text())


@pytest.fixture(scope="module")
def whole(tiny: Path) -> Any:
    return reference(tiny)


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny)


@pytest.mark.slow
@pytest.mark.timeout(900)  # the first test that needs the default model makes it
def test_the_default_model_as_planned() -> None:
    """Nothing rounded: the model itself. 8 bits: what it says is hardly less likely."""
    default = reference(default_checkpoint())
    window = torch.arange(1000, 1064)[None]
    plain = window_nats(default, window)
    with PlannedExperts(default, everything(EXACT)) as planned:
        assert torch.equal(window_nats(default, window), plain)
        planned.decide = everything(8)
        assert float(window_nats(default, window).mean()) == pytest.approx(float(plain.mean()), rel=0.05)
        assert not planned.renormalise


def test_a_window_meets_the_simulators_draw(scenario: Scenario, whole: Any, tokenizer: Any) -> None:
    """On the very tokens of the trace, plans take what the simulator says, draw by draw and variant by variant."""
    window = torch.tensor(tokenizer(TEXT)["input_ids"][:WINDOW])
    measured = measure(scenario, scenario.variants, whole, tokenizer, window.repeat(2, 1), [])
    simulated = run_study(scenario, workers=1).of("latency_s").T
    np.testing.assert_allclose(measured.latency_s[:2], simulated[:2], rtol=1e-9)
    np.testing.assert_allclose(measured.latency_s[2], simulated[2], rtol=0.05)  # ranks by gates in float16
    assert simulated[0, 0] != simulated[0, 1]
    plain, hertz, coarse = qualities(measured)
    assert (plain.ratio, plain.accuracy_change, plain.dropped_weight) == (1.0, pytest.approx(math.nan, nan_ok=True), 0)
    assert hertz.perplexity == plain.perplexity  # bandwidth alone changes no value
    assert coarse.perplexity != plain.perplexity
    assert 0 < coarse.dropped_weight <= 0.3
    assert plain.perplexity == pytest.approx(window_perplexity(whole, window[None]), rel=1e-2)


def test_bits_of_light_assignments_cost_what_they_cost(scenario: Scenario, whole: Any, tokenizer: Any) -> None:
    """The model reads with the bits that the simulator's time is for."""
    window = torch.tensor(tokenizer(TEXT)["input_ids"][:WINDOW])[None]
    levers = Levers(max_distortion=0.03, multicast="superposition")
    light = replace(scenario.variants[1], name="light", policy=replace(scenario.variants[1].policy, levers=levers))
    measured = measure(scenario, (scenario.variants[0], light), whole, tokenizer, window, [])
    simulated = run_study(replace(scenario, draws=1, variants=(light,)), workers=1)
    np.testing.assert_allclose(measured.latency_s[1], simulated.of("latency_s")[:, 0], rtol=0.02)  # float16 gates
    assert measured.nats[1] != measured.nats[0]
    assert measured.nats[1] == pytest.approx(measured.nats[0], rel=0.05)


def test_intervals_are_of_the_windows(scenario: Scenario, whole: Any, tokenizer: Any) -> None:
    windows = torch.tensor(tokenizer(TEXT)["input_ids"][: 4 * WINDOW]).view(4, WINDOW)
    seen: list[tuple[int, int]] = []
    questions = [Question("ab", ("c", "dd"), frozenset({0}))] * 2
    measured = measure(
        scenario, scenario.variants[:2], whole, tokenizer, windows, questions, lambda *done: seen.append(done)
    )
    assert seen == [(2, 12), (4, 12), (6, 12), (8, 12), (9, 12), (10, 12), (11, 12), (12, 12)]
    found = qualities(measured)[0]
    nats = np.array([float(window_nats(whole, each[None]).mean()) for each in windows])
    half = 3.182446 * nats.std(ddof=1) / 2  # Student's t with 3 degrees of freedom at 0.975
    assert found.perplexity_high == pytest.approx(math.exp(nats.mean() + half), rel=2e-2)
    assert found.perplexity_low == pytest.approx(math.exp(nats.mean() - half), rel=2e-2)
    assert found.accuracy in (0, 1)
    assert found.accuracy_ci == 0


def test_choices_are_scored_as_if_each_was_read_alone(whole: Any, tokenizer: Any) -> None:
    question = Question("Which? ", ("a", "a much longer one", "two"), frozenset({1}))
    real: list[torch.Tensor] = []
    found = choice_nats(whole, tokenizer, question, real.append)
    for choice, nats in zip(question.choices, found, strict=True):
        ids = torch.tensor(tokenizer(question.query + choice)["input_ids"])
        begin = len(tokenizer("Which?")["input_ids"])
        assert nats == pytest.approx(float(window_nats(whole, ids[None])[0, begin - 1 :].sum()), rel=1e-5)
    assert [int(row.sum()) for row in real[0]] == [8, 24, 10]


def test_the_likeliest_choice_counts_whole_or_by_the_byte() -> None:
    question = Question("q", ("a", "bb", "cccc"), frozenset({2}))
    assert (score(question, [3.0, 2.0, 4.0]).right, score(question, [3.0, 2.0, 3.9]).right_normalised) == (False, True)
    assert score(question, [3.0, 2.0, 1.0]).right


def test_gold_is_an_index_or_scores(tmp_path: Path) -> None:
    file = tmp_path / "q.jsonl"
    lines = [{"query": "q", "choices": ["a", "b"], "gold": gold} for gold in (1, [0.5, 0.5], [1, 0])]
    file.write_text("\n\n".join(json.dumps(each) for each in lines))
    found = read_questions(file, ": ")
    assert [set(each.best) for each in found] == [{1}, {0, 1}, {0}]
    assert found[0].query == "q: "


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2 is not"),
        ("[]", "line 2 is not"),
        ('{"query": "q", "choices": ["a", "b"]}', "'gold' is missing"),
        ('{"query": "q", "choices": ["a"], "gold": 0}', "two or more"),
        ('{"query": "q", "choices": ["a", "b"], "gold": 2}', "index from 0 to 1"),
        ('{"query": "q", "choices": ["a", "b"], "gold": [1]}', "2 scores"),
        ('{"query": "q", "choices": ["a", "b"], "gold": true}', "index from 0 to 1"),
        ('{"query": 3, "choices": ["a", "b"], "gold": 0}', "line 2"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, said: str) -> None:
    file = tmp_path / "q.jsonl"
    file.write_text('{"query": "q", "choices": ["a", "b"], "gold": 0}\n' + line)
    with pytest.raises(ConfigError, match=said) as caught:
        read_questions(file)
    assert "\n" not in str(caught.value)


def test_bigbench_tasks_come_from_a_file_or_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = tmp_path / "bigbench" / "benchmark_tasks" / "sums" / "task.json"
    task.parent.mkdir(parents=True)
    task.write_text(json.dumps({"examples": [{"input": "1+1?", "target_scores": {"2": 1, "3": 0}}]}))
    (question,) = read_bigbench(str(task))
    assert question == Question("Q: 1+1?\n  choice: 2\n  choice: 3\nA: ", ("2", "3"), frozenset({0}))
    with pytest.raises(MissingExtraError, match="pip install"):
        read_bigbench("sums")
    (tmp_path / "bigbench" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert read_bigbench("sums") == [question]
    for wrong in ("nope", "../sums"):
        with pytest.raises(ConfigError, match="BIG-bench"):
            read_bigbench(wrong)
    task.write_text('{"examples": [{"input": "free", "target": "text"}]}')
    with pytest.raises(ConfigError, match="target_scores"):
        read_bigbench("sums")


def test_what_does_not_fit_is_said(scenario: Scenario, tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="no variant 'x'; it has 'plain'"):
        with_baseline(scenario, ["x"])
    assert [each.name for each in with_baseline(scenario, ["coarse"])] == ["plain", "coarse"]
    other = tiny_model(tiny_config("mixtral", num_hidden_layers=1))
    with pytest.raises(ConfigError, match="3 layers of 8 experts, the model 1 of 8"):
        measure(scenario, scenario.variants, other, tokenizer, torch.zeros(1, 8, dtype=torch.long), [])


def run_tool(repository: Path, monkeypatch: pytest.MonkeyPatch, name: str, *flags: object) -> None:
    monkeypatch.setattr("sys.argv", [name, *map(str, flags)])
    runpy.run_path(str(repository / "tools" / "study" / name), run_name="__main__")


def test_the_tools_from_flags_to_files(
    repository: Path, monkeypatch: pytest.MonkeyPatch, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = tmp_path / "q.jsonl"
    questions.write_text("\n".join(f'{{"query": "q{i}", "choices": ["a", "bc"], "gold": 0}}' for i in range(5)))
    usual = ["--model", tiny, "--text", tiny / "text.txt", "--tokens", 64, "--window", 32, "--questions", questions]
    usual += ["--most-questions", 3]
    found = tmp_path / "found.json"
    flags = ["--scenario", tiny / "scenario.toml", "--variant", "coarse", "--json", found]
    run_tool(repository, monkeypatch, "eval_quality", *usual, *flags)
    told = capsys.readouterr().out
    assert "2 windows of 32 tokens, 3 questions" in told
    values = json.loads(found.read_text())
    assert np.shape(values["nats_of_windows"]) == (2, 2)
    assert np.shape(values["right"]) == (2, 3)

    run_tool(repository, monkeypatch, "waterfall", tiny / "scenario.toml", "--out", tmp_path / "out", *usual)
    told = capsys.readouterr().out
    assert "| coarse | " in told
    names = {f"waterfall.{kind}" for kind in ("csv", "md", "png", "svg")} | {"quality.json", "manifest.json"}
    assert names <= {file.name for file in (tmp_path / "out").iterdir()}
    assert json.loads((tmp_path / "out" / "quality.json").read_text())["nats_of_windows"][1:] != []
    verify_results(tmp_path / "out", workers=1)
    table = tmp_path / "out" / "waterfall.csv"
    table.write_text(table.read_text().replace("coarse", "fine"))
    with pytest.raises(ConfigError, match=r"waterfall\.csv was changed"):
        verify_results(tmp_path / "out", workers=1)

    for wrong in (["--tokens", 8], ["--tokens", 0], ["--questions", tmp_path / "none"], ["--model", tmp_path]):
        with pytest.raises(SystemExit, match=r"^error: [^\n]+$"):
            run_tool(repository, monkeypatch, "eval_quality", "--model", tiny, *wrong)
