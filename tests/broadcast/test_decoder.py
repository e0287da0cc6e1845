"""The decoder as an ONNX file: equal to PyTorch, the same bytes each time, and what is no decoder is refused."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import textwrap

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from wdmoe.broadcast.codec.channel import awgn, rayleigh
from wdmoe.broadcast.codec.decoder_export import INPUTS, IR_VERSION, OPSET, decoder_graph
from wdmoe.broadcast.codec.model import BroadcastCodec, ModelSettings
from wdmoe.broadcast.codec.receiver import Ear
from wdmoe.errors import ConfigError, ExpertError
from wdmoe.nodes.device.broadcast_decoder import OnnxDecoder
from wdmoe.wireless.broadcast import broadcast_awgn, broadcast_rayleigh

TOLERANCE = 1e-4  # of the ONNX decoders against PyTorch
SMALL = ModelSettings(width=16, heads=2, encoder_depth=1, decoder_depth=2, condition=8, slots=8)


def shaken(settings: ModelSettings) -> BroadcastCodec:
    """A codec none of whose weights are at their start: modulations begin at zero and would hide what they do."""
    torch.manual_seed(0)
    codec = BroadcastCodec(settings)
    with torch.no_grad():
        for weight in codec.parameters():
            weight.add_(torch.randn_like(weight) * 0.05)
    return codec.eval()


@pytest.fixture(scope="module", params=[ModelSettings(), SMALL], ids=["default", "small"])
def codec(request: pytest.FixtureRequest) -> BroadcastCodec:
    return shaken(request.param)


@pytest.mark.parametrize("blocks", [1, 2, 33])
def test_it_equals_pytorch(codec: BroadcastCodec, blocks: int, rng: np.random.Generator) -> None:
    decoder = OnnxDecoder(decoder_graph(codec), threads=1)
    tokens, slots = decoder.tokens, decoder.slots
    assert (tokens, slots) == (64, codec.settings.slots)
    for user in (0, 1):
        kept = max(1, slots // 2)
        heard = rng.normal(size=(blocks, tokens * kept, 2)).astype(np.float32)
        snr_db, share = rng.uniform(-30, 40, blocks).astype(np.float32), rng.random(blocks, dtype=np.float32)
        got = decoder.run(heard, snr_db, share, kept, user) / 255
        whole = torch.zeros(blocks, tokens, slots, 2)
        whole[:, :, :kept] = torch.from_numpy(heard.reshape(blocks, tokens, kept, 2))
        told = (torch.from_numpy(snr_db), torch.from_numpy(share), torch.full((blocks,), float(kept)))
        with torch.no_grad():
            wanted = codec.decode(whole, *told, torch.full((blocks,), float(user))).permute(0, 2, 3, 1).numpy()
        assert np.abs(got - wanted).max() < TOLERANCE
        assert np.ptp(wanted) > 100 * TOLERANCE


def test_the_file_is_plain_and_the_same_each_time(codec: BroadcastCodec) -> None:
    data = decoder_graph(codec)
    assert decoder_graph(codec) == data
    model = onnx.load_model_from_string(data)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", OPSET)]
    assert model.ir_version <= IR_VERSION
    assert [end.name for end in model.graph.input] == list(INPUTS)
    assert all(end.type.tensor_type.shape.dim[0].dim_param == "block" for end in model.graph.input)
    assert b".py" not in data


@pytest.mark.slow
def test_another_process_writes_the_same_bytes() -> None:
    code = """
        import hashlib
        from tests.broadcast.test_decoder import SMALL, shaken
        from wdmoe.broadcast.codec.decoder_export import decoder_graph
        print(hashlib.sha256(decoder_graph(shaken(SMALL))).hexdigest())
    """
    words = [sys.executable, "-c", textwrap.dedent(code)]
    said = subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    assert said == hashlib.sha256(decoder_graph(shaken(SMALL))).hexdigest()


def _graph(shape: list[object], output: str = "pictures") -> bytes:
    inputs = [helper.make_tensor_value_info("heard", TensorProto.FLOAT, shape)]
    inputs += [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b"]) for name in INPUTS[1:]]
    outputs = [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["b", None, None, None])]
    graph = helper.make_graph([helper.make_node("Identity", ["heard"], [output])], "g", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    return model.SerializeToString()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "cannot open"),
        (b"no graph at all", "cannot open"),
        (_graph(["b", 64, 16, 3]), "no decoder"),
        (_graph(["b", 64, 16, 2], output="y"), "no decoder"),
        (_graph(["b", "t", 16, 2]), "fixed sizes"),
        (_graph(["b", 64, 100_000, 2]), "fixed sizes"),
        (_graph([4, 64, 16, 2]), "no decoder"),
    ],
)
def test_what_is_no_decoder_is_refused(data: bytes, reason: str) -> None:
    with pytest.raises(ExpertError, match=reason):
        OnnxDecoder(data, threads=1)


def test_a_decoder_that_gives_something_else_is_caught() -> None:
    decoder = OnnxDecoder(_graph(["b", 64, 16, 2]), threads=1)
    numbers = np.ones(2, np.float32)
    with pytest.raises(ExpertError, match="gave"):
        decoder.run(np.zeros((2, 64 * 16, 2), np.float32), numbers, numbers, 16, 0)


def a_block(rng: np.random.Generator, uses: int = 64 * 8) -> np.ndarray:
    parts = rng.normal(size=(uses, 2))
    return parts / np.sqrt((parts**2).sum(axis=1).mean())


@pytest.mark.parametrize("fades", [False, True])
def test_an_ear_is_the_channel_that_the_codec_was_trained_on(fades: bool, rng: np.random.Generator) -> None:
    """The same draws through `wdmoe.broadcast.codec.channel`."""
    symbols, ear = a_block(rng), Ear(user=1, snr_db=7.0, fades=fades, seed=5)
    heard, snr_db = ear.hear(12, symbols)
    again = np.random.default_rng([5, 1, 12])
    sent = torch.from_numpy(symbols.reshape(1, 64, 8, 2)).float()
    channel = broadcast_rayleigh if fades else broadcast_awgn
    draws = channel(again, (symbols[:, 0] + 1j * symbols[:, 1])[None], [7.0])
    gain = draws.gain[0, 0]
    noise = (draws.symbols[0, 0] - gain * (symbols[:, 0] + 1j * symbols[:, 1])) / np.sqrt(draws.noise_power[0])
    parts = torch.from_numpy(np.stack([noise.real, noise.imag], -1).reshape(1, 1, 64, 8, 2)).float()
    level = torch.tensor([[7.0]])
    if fades:
        known = torch.tensor([[[gain.real, gain.imag]]], dtype=torch.float32)
        wanted = rayleigh(sent, level, parts, known, torch.zeros_like(known), 0.0)
    else:
        wanted = awgn(sent, level, parts)
    np.testing.assert_allclose(heard, wanted.symbols.reshape(-1, 2).numpy(), atol=1e-4)
    assert snr_db == pytest.approx(float(wanted.snr_db[0, 0]), abs=1e-4)


def test_a_block_is_heard_the_same_whatever_else_is_heard(rng: np.random.Generator) -> None:
    symbols, ear = a_block(rng), Ear(user=0, snr_db=10, fades=True, seed=1)
    first, _ = ear.hear(4, symbols)
    ear.hear(5, symbols)
    second, _ = ear.hear(4, symbols)
    assert np.array_equal(first, second)
    assert not np.array_equal(first, ear.hear(5, symbols)[0])
    assert not np.array_equal(first, Ear(user=1, snr_db=10, fades=True, seed=1).hear(4, symbols)[0])


@pytest.mark.parametrize("scale", [0.0, 2.0, np.nan, np.inf])
def test_an_ear_refuses_another_power(scale: float, rng: np.random.Generator) -> None:
    with pytest.raises(ConfigError, match="power"):
        Ear(user=0, snr_db=10, fades=False, seed=0).hear(0, a_block(rng) * scale)


@pytest.mark.parametrize("snr_db", [-31.0, 41.0, float("nan")])
def test_an_ear_has_a_range(snr_db: float) -> None:
    with pytest.raises(ConfigError, match="from -30 to 40 dB"):
        Ear(user=0, snr_db=snr_db, fades=False, seed=0)
