"""The station as graphs in ONNX Runtime against the same model in transformers: logits, tokens, caches, precisions."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import hashlib
import json
import shutil
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.backbone.test_spine import PROMPT, answer, ask, greedy
from tests.lab.engine_lab import Lab
from tests.lab.families import GRAPHS, HEADS, LATENT, LONGROPE, SIXTEEN, reference, save_tiny, tiny_config, tiny_model
from wdmoe.arrays import Float32Array, Int32Array
from wdmoe.backbone.export.export import ExportSettings, export_bundle
from wdmoe.backbone.families import experts_modules
from wdmoe.backbone.format.bundle import Bundle
from wdmoe.backbone.format.manifest import MANIFEST_NAME
from wdmoe.backbone.graphs import sessions
from wdmoe.backbone.graphs.cache import Former, Row, Rows
from wdmoe.backbone.graphs.prefixes import Prefixes
from wdmoe.backbone.graphs.running import GraphModel
from wdmoe.backbone.graphs.tensors import StationTensors
from wdmoe.backbone.graphs.ways import Span
from wdmoe.backbone.graphs.writing.graph import CONTRIB, OPERATORS
from wdmoe.backbone.graphs.writing.plan import SUPPORTED, station_plan
from wdmoe.backbone.graphs.writing.quantise import quantised
from wdmoe.backbone.graphs.writing.segments import attention_graph, head_graph, layer_graphs
from wdmoe.backbone.perplexity import window_nats
from wdmoe.errors import BundleError, ConfigError, UnsupportedModelError
from wdmoe.layer_call import Demand

WITHIN = 1e-4  # of logits, in fp32
ROPES = [
    {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    {
        "rope_type": "llama3",
        "rope_theta": 1e4,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128},
]
CASES = [(family, more) for family, all_of in GRAPHS.items() for more in all_of] + [
    ("mixtral", {**SIXTEEN, "rope_parameters": rope}) for rope in ROPES
]


class Pair:
    """A tiny model in transformers, and its graphs with the same experts."""

    def __init__(self, family: str, more: dict[str, Any], bits: int = 32) -> None:
        config = tiny_config(family, **{**HEADS, **more})
        self.model = tiny_model(config)
        self._modules = experts_modules(self.model)
        every = {name: tensor.float().numpy() for name, tensor in self.model.state_dict().items()}
        tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
        self.tensors = {name: value for name, value in every.items() if ".experts." not in name and name not in tied}
        self.plan = station_plan(config.to_dict(), self.tensors, set(self._modules))
        self.graphs = GraphModel(self.plan, self.tensors, bits=bits, threads=1, positions=256)
        self.rows = Rows(self.plan, self.graphs.forget)

    def experts(
        self, layer: int, tokens: Float32Array, demand: Demand, meanwhile: Callable[[], object] | None
    ) -> Float32Array:
        if meanwhile is not None and layer % 2:  # it may be called, or not
            meanwhile()
        chosen = torch.from_numpy(demand.experts.astype(np.int64)), torch.from_numpy(np.array(demand.weights))
        with torch.no_grad():
            out: Float32Array = self._modules[layer](torch.from_numpy(np.array(tokens)), *chosen).numpy()
        return out

    def step(self, ids: Int32Array, row: Row, scored: Any = (-1,)) -> Float32Array:
        """Some more tokens of one request."""
        wanted = None if scored is None else (np.arange(len(ids))[list(scored)] if scored else np.arange(0))
        return self.graphs.run(ids, [Span([row], len(ids))], self.experts, wanted)

    def logits(self, ids: Int32Array) -> Float32Array:
        with torch.no_grad():
            out: Float32Array = self.model(torch.from_numpy(ids[None].astype(np.int64))).logits[0].numpy()
        return out


@pytest.mark.parametrize("in_one", [True, False], ids=["in one graph", "in parts"])
@pytest.mark.parametrize(("family", "more"), CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_logits_are_those_of_transformers(
    family: str, more: dict[str, Any], in_one: bool, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt in chunks, then token by token, past every sliding window."""
    if not in_one:
        monkeypatch.setattr(sessions, "WHOLE_BYTES", 0)
    pair = Pair(family, more)
    ids = rng.integers(0, 250, 60).astype(np.int32)
    want, row, got = pair.logits(ids), pair.rows.enter(60), {}
    assert pair.step(ids[:7], row, scored=()).size == 0
    got[39] = pair.step(ids[7:40], row)
    for at in range(40, 60):
        got[at] = pair.step(ids[at : at + 1], row)
    for at, scores in got.items():
        np.testing.assert_allclose(scores[0], want[at], atol=WITHIN)
    whole = pair.step(ids, pair.rows.enter(60), scored=None)
    np.testing.assert_allclose(whole, want, atol=WITHIN)


def test_every_family_is_tested() -> None:
    assert set(SUPPORTED) - {"granitemoe"} == set(GRAPHS)  # that one is granitemoeshared without a shared expert


@pytest.mark.parametrize("family", ["gpt_oss", "phimoe", "deepseek_v3"])
def test_requests_of_any_length_share_a_pass(family: str, rng: np.random.Generator) -> None:
    """Rows of one token and pieces of prompts together, in every order of coming and going."""
    pair = Pair(family, GRAPHS[family][0])
    texts = [rng.integers(0, 250, size).astype(np.int32) for size in (40, 33, 52, 45, 60, 38, 41, 57, 50, 36)]
    want = [pair.logits(ids) for ids in texts]
    rows = [pair.rows.enter(len(ids)) for ids in texts]
    checked = 0
    while any(row.seen < len(ids) for row, ids in zip(rows, texts, strict=True)):
        going = [at for at in rng.permutation(len(texts)) if rows[at].seen < len(texts[at]) and rng.random() < 0.7]
        sizes = [min(int(rng.choice((1, 1, 9))), len(texts[at]) - rows[at].seen) for at in going]
        if not going:
            continue
        before = [rows[at].seen for at in going]
        ids = np.concatenate(
            [texts[at][seen : seen + size] for at, seen, size in zip(going, before, sizes, strict=True)]
        )
        spans = [Span([rows[at]], size) for at, size in zip(going, sizes, strict=True)]
        scores = pair.graphs.run(ids, spans, pair.experts)
        expected = [want[at][seen : seen + size] for at, seen, size in zip(going, before, sizes, strict=True)]
        np.testing.assert_allclose(scores, np.concatenate(expected), atol=WITHIN)
        checked += len(scores)
    assert checked == sum(map(len, texts))


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v2"])
def test_neighbours_are_decoded_as_one(family: str, rng: np.random.Generator) -> None:
    pair = Pair(family, GRAPHS[family][0])
    texts = [rng.integers(0, 250, size).astype(np.int32) for size in (20, 7, 33)]
    rows = [pair.rows.enter(40) for _ in texts]
    for ids, row in zip(texts, rows, strict=True):
        pair.step(ids[:-1], row)
    scores = pair.graphs.run(np.array([ids[-1] for ids in texts], np.int32), [Span(rows, 1)], pair.experts)
    for ids, got in zip(texts, scores, strict=True):
        np.testing.assert_allclose(got, pair.logits(ids)[-1], atol=WITHIN)


def test_rows_come_and_go_and_leave_no_memory() -> None:
    pair = Pair("mixtral", {})
    rows = [pair.rows.enter(tokens) for tokens in (10, 256, 257, 1024)]
    assert [row.slab.capacity for row in rows] == [256, 256, 512, 1024]
    assert (rows[0].index, rows[1].index, pair.rows.slabs) == (0, 1, 3)
    pair.rows.leave(rows[0])
    assert pair.rows.enter(5).index == 0
    many = [pair.rows.enter(1) for _ in range(7)]
    assert pair.rows.slabs == 4
    slab = weakref.ref(many[-1].slab)
    pair.step(np.array([1, 2], np.int32), many[-1])
    experts = pair.experts

    def leaves_meanwhile(*words: Any) -> Float32Array:
        """As where a client goes away while others' experts work."""
        if len(many) == 7:
            pair.rows.leave(many.pop())
        return experts(*words)

    pair.graphs.run(np.array([1, 2], np.int32), [Span([rows[1]], 2)], leaves_meanwhile)
    assert pair.rows.slabs == 3
    gc.collect()
    assert slab() is None


@pytest.mark.parametrize(("bits", "most"), [(8, 0.02), (4, 0.25)])
def test_fewer_bits_are_nearly_the_same(bits: int, most: float, rng: np.random.Generator) -> None:
    pair = Pair("qwen2_moe", {"num_experts_per_tok": 8}, bits)  # all of them: no choice turns on a small difference
    ids = rng.integers(0, 250, 30).astype(np.int32)
    got = pair.step(ids, pair.rows.enter(30), scored=None)
    want = pair.logits(ids)
    assert 0 < np.linalg.norm(got - want) / np.linalg.norm(want) < most


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_blocks_are_near(bits: int, rng: np.random.Generator) -> None:
    matrix = rng.standard_normal((5, 96)).astype(np.float32)
    matrix[2] = 0
    whole, scale = quantised(matrix, bits)
    if bits == 4:
        whole = np.stack([whole & 15, whole >> 4], axis=-1).reshape(5, 3, 32)
    back = (whole.astype(np.float32) - (1 << (bits - 1))) * scale.reshape(5, 3, 1)
    # The end beyond the largest magnitude of the other sign is one step away.
    step = np.abs(matrix.reshape(5, 3, 32)).max(-1, keepdims=True) / (1 << (bits - 1))
    assert (np.abs(back.reshape(5, 96) - matrix).reshape(5, 3, 32) <= step * 1.0001).all()


def test_only_listed_operators_are_used() -> None:
    import onnx

    seen = set()
    for family, more in CASES:
        pair = Pair(family, more)
        for bits in (32, 8):
            made = [head_graph(pair.plan, pair.tensors, bits)]
            made += [attention_graph(each.attention.shape, 8) for each in pair.plan.layers]
            for graphs in layer_graphs(pair.plan, pair.tensors, bits):
                made += filter(None, (graphs.before, graphs.after, graphs.whole, graphs.shared))
            for model in map(onnx.load_model_from_string, made):
                seen |= {(node.domain, node.op_type) for node in model.graph.node}
                assert {(each.domain, each.version) for each in model.opset_import} == {("", 17), (CONTRIB, 1)}
    assert seen == OPERATORS


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_type": "jamba"}, "jamba"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"head_dim": 8}, "heads of multiples of 16"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "longrope"),
    ],
)
def test_what_has_no_graph_is_refused_by_name(change: dict[str, Any], says: str) -> None:
    config = tiny_config("mixtral", **HEADS).to_dict() | change
    with pytest.raises(UnsupportedModelError, match=says):
        station_plan(config, (), {0, 1, 2})


def test_longrope_that_changes_its_scale_is_refused() -> None:
    config = tiny_config("phimoe", **HEADS, rope_parameters={**LONGROPE, "long_mscale": 1.5}).to_dict()
    with pytest.raises(UnsupportedModelError, match="changes with the length"):
        station_plan(config, (), {0, 1, 2})


def test_latent_attention_keeps_one_vector_of_a_token() -> None:
    kept = [
        Pair("deepseek_v2", {**LATENT, "num_attention_heads": heads, "num_key_value_heads": heads}).rows.size_bytes(1)
        for heads in (2, 4)
    ]
    assert kept[0] == kept[1] == 3 * 256 * 2 * (16 + 16) * 4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("mixtral", tmp_path_factory.mktemp("sixteen"), **HEADS)


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    out = tmp_path_factory.mktemp("bundle") / "mixtral"
    export_bundle(checkpoint, out, ExportSettings())
    return Bundle.open(out)


@pytest.fixture(scope="module")
def lab(bundle: Bundle) -> Iterator[Lab]:
    opened = Lab(bundle, engine="graphs")
    yield opened
    opened.close()


def test_an_answer_is_the_undivided_models(lab: Lab, checkpoint: Path) -> None:
    """The prompt is longer than a chunk of this lab."""
    assert lab.station.kind == "graphs"
    for prompt in (PROMPT, tuple(range(30, 80))):
        ids, _, receipt = ask(lab, prompt)
        assert ids == greedy(checkpoint, prompt)
        assert not receipt.degraded
        assert receipt.completion_tokens == len(ids)
        stages = receipt.stages
        assert stages.bs_compute > 0
        assert sum(dataclasses.astuple(stages)) == pytest.approx(receipt.elapsed_s, rel=0.05)


def test_answers_at_the_same_time_are_each_right(lab: Lab, checkpoint: Path) -> None:
    prompts = [tuple(range(at, at + size)) for at, size in ((40, 3), (60, 21), (80, 40), (100, 9))]

    async def together() -> list[Any]:
        return await asyncio.gather(*(answer(lab, prompt) for prompt in prompts))

    for prompt, (ids, _, _) in zip(prompts, asyncio.run(together()), strict=True):
        assert ids == greedy(checkpoint, prompt)


def test_a_seed_gives_the_same_answer_again_and_another_seed_another(lab: Lab) -> None:
    first, again, other = (ask(lab, temperature=1.0, seed=seed)[0] for seed in (5, 5, 6))
    assert first == again != other
    few = ask(lab, temperature=1.0, seed=5, top_p=0.01)[0]
    assert few == ask(lab)[0]  # only the best is left


def test_how_likely_a_text_is(lab: Lab, checkpoint: Path) -> None:
    windows = np.arange(40, 80, dtype=np.int32).reshape(2, 20)
    got = lab.engine.call(lambda station, ledger: station.nats(windows, ledger)).result(60)
    want = window_nats(reference(checkpoint), torch.from_numpy(windows.astype(np.int64))).numpy()
    np.testing.assert_allclose(got, want, atol=WITHIN)


def test_asked_for_by_name_and_not_there_is_one_line(tmp_path: Path) -> None:
    export_bundle(save_tiny("mixtral", tmp_path / "model"), tmp_path / "bundle", ExportSettings())
    with pytest.raises(ConfigError, match="multiples of 16, not of 8; leave --engine"):
        Lab(Bundle.open(tmp_path / "bundle"), engine="graphs")


def test_what_config_json_does_not_say_is_as_the_family_takes_it(checkpoint: Path, tmp_path: Path) -> None:
    """Some published ones leave out what transformers has a default for. Mixtral's angle is not that of others."""
    spoken = shutil.copytree(checkpoint, tmp_path / "model") / "config.json"
    config = json.loads(spoken.read_text())
    del config["rope_parameters"], config["rms_norm_eps"]
    spoken.write_text(json.dumps(config))
    export_bundle(spoken.parent, tmp_path / "bundle", ExportSettings())
    lab = Lab(Bundle.open(tmp_path / "bundle"), engine="graphs")
    try:
        windows = np.arange(40, 120, dtype=np.int32).reshape(2, 40)
        got = lab.engine.call(lambda station, ledger: station.nats(windows, ledger)).result(60)
    finally:
        lab.close()
    want = window_nats(reference(spoken.parent), torch.from_numpy(windows.astype(np.int64))).numpy()
    np.testing.assert_allclose(got, want, atol=WITHIN)


@pytest.mark.parametrize(
    "change", [{"rope_parameters": None}, {"rope_parameters": {}}, {"hidden_size": "x"}, {"num_attention_heads": 0}]
)
def test_a_config_that_no_export_wrote_is_one_line(bundle: Bundle, tmp_path: Path, change: dict[str, Any]) -> None:
    odd = shutil.copytree(bundle.root, tmp_path / "bundle")
    spoken = odd / "station" / "config.json"
    data = json.dumps({**json.loads(spoken.read_text()), **change}).encode()
    spoken.write_bytes(data)
    manifest = json.loads((odd / MANIFEST_NAME).read_text())
    (said,) = (file for file in manifest["station"] if file["path"] == "station/config.json")
    said.update(sha256=hashlib.sha256(data).hexdigest(), size=len(data))
    (odd / MANIFEST_NAME).write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=r"config\.json cannot be what an export wrote: \w+: "):
        Lab(Bundle.open(odd), engine="graphs")


def test_tensors_come_out_as_they_went_in(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    made = {"a": torch.randn(3, 5), "b": torch.randn(7).bfloat16(), "c": torch.randn(2, 2).half(), "n": torch.arange(3)}
    save_file(made, tmp_path / "x.safetensors")
    read = StationTensors([tmp_path / "x.safetensors"])
    assert set(read) == set(made)
    for name in "abc":
        np.testing.assert_array_equal(read[name], made[name].float().numpy())
    assert "nowhere" not in read
    assert "n" in read
    with pytest.raises(BundleError, match="I64"):
        read["n"]


@pytest.mark.parametrize("spoil", ["short", "header", "offsets", "text"])
def test_a_damaged_file_is_named(tmp_path: Path, spoil: str) -> None:
    file = tmp_path / "x.safetensors"
    header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8 if spoil != "offsets" else 80]}})
    data = len(header).to_bytes(8, "little") + header.encode() + bytes(8)
    file.write_bytes(
        {"short": b"abc", "header": b"\xff" * 20, "offsets": data, "text": data.replace(b"{", b"[", 1)}[spoil]
    )
    with pytest.raises(BundleError, match=r"x\.safetensors of the station is damaged"):
        StationTensors([file])


def test_the_next_turn_computes_only_what_is_new(bundle: Bundle, checkpoint: Path) -> None:
    first = tuple(range(40, 70))
    lab = Lab(bundle, engine="graphs")
    try:
        ids, _, whole = ask(lab, first)
        again = first + tuple(ids) + (99, 98)
        got, _, receipt = ask(lab, again)
        assert got == greedy(checkpoint, again)
        assert whole.reused_tokens == 0
        assert receipt.reused_tokens == len(first) + len(ids) - 1  # the last token's keys were never computed
        assert receipt.bytes_down < whole.bytes_down
        same, _, receipt = ask(lab, first)
        assert same == ids
        assert receipt.reused_tokens == len(first) - 1
        assert ask(lab, tuple(range(80, 110)))[2].reused_tokens == 0
    finally:
        lab.close()


def test_what_is_degraded_is_not_kept(bundle: Bundle) -> None:
    prompt = tuple(range(40, 70))
    lab = Lab(bundle, engine="graphs")
    try:
        lab.route(without=frozenset({"device 1"}))
        assert ask(lab, prompt)[2].degraded
        lab.route()
        assert ask(lab, prompt)[2].reused_tokens == 0
        assert ask(lab, prompt)[2].reused_tokens > 0
        lab.station.forget()
        assert ask(lab, prompt)[2].reused_tokens == 0
    finally:
        lab.close()


def test_what_is_kept_is_bounded_and_the_oldest_goes_first() -> None:
    pair = Pair("mixtral", {})
    texts = [np.arange(start, start + 20, dtype=np.int32) for start in (0, 50, 100, 150)]

    def former(tokens: int = 20) -> Former:
        row = pair.rows.enter(tokens)
        row.seen = tokens
        return row.copy()

    size_bytes = former().size_bytes
    prefixes = Prefixes(3 * size_bytes)

    def known(ids: Int32Array) -> int:
        return prefixes.begin(np.append(ids, 7).astype(np.int32), pair.rows.enter(30))

    for ids in texts[:3]:
        prefixes.keep(ids, former())
    assert known(texts[0]) == 20  # used again, so it is not the oldest
    prefixes.keep(texts[3], former())
    assert [known(ids) for ids in texts] == [20, 0, 20, 20]
    assert prefixes.size_bytes == 3 * size_bytes
    prefixes.keep(texts[3], former())
    assert prefixes.size_bytes == 3 * size_bytes  # once only
    assert known(texts[0][:10]) == 0  # too little in common
    row = pair.rows.enter(20)
    row.seen = 20
    assert row.seen_bytes == size_bytes
    assert prefixes.wants(row)
    assert not Prefixes(size_bytes - 1).wants(row)
    row.seen = 15
    assert not prefixes.wants(row)
