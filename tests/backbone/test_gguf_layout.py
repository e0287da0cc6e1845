"""Our reading of GGUF files against the gguf package's, and files that are damaged anywhere."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wdmoe.backbone.split.gguf_layout import read_gguf
from wdmoe.errors import BundleError


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Metadata of every kind, and tensors plain and quantised."""
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for bits in (8, 16, 32, 64):
        getattr(writer, f"add_uint{bits}")(f"test.uint{bits}", (1 << bits) - 1)
        getattr(writer, f"add_int{bits}")(f"test.int{bits}", -(1 << bits - 1))
    writer.add_float32("test.float32", 1e-5)
    writer.add_float64("test.float64", 1e-5)
    writer.add_bool("test.bool", True)
    writer.add_string("test.string", "Grüße 北京")
    writer.add_array("test.strings", ["a", "", "Ġthe"])
    writer.add_array("test.numbers", [1, 2, 3])
    rng = np.random.default_rng(0)
    writer.add_tensor("plain", rng.standard_normal((3, 64), np.float32))
    writer.add_tensor("half", rng.standard_normal((2, 5, 32)).astype(np.float16))
    packed = gguf.quantize(rng.standard_normal((4, 64), np.float32), gguf.GGMLQuantizationType.Q4_1)
    writer.add_tensor("packed", packed, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_gguf_package_reads_the_same(file: Path) -> None:
    fields, tensors = read_gguf(file)
    theirs = gguf.GGUFReader(file)
    own = {name: field for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    assert fields == {name: field.contents() for name, field in own.items()}
    assert list(tensors) == [tensor.name for tensor in theirs.tensors]
    for wanted in theirs.tensors:
        found = tensors[wanted.name]
        assert (found.kind, list(found.dimensions)) == (wanted.tensor_type, wanted.shape.tolist())
        np.testing.assert_array_equal(
            gguf.dequantize(found.data, found.kind), gguf.dequantize(wanted.data, wanted.tensor_type)
        )


@given(data=st.data())
def test_a_file_that_is_cut_short_is_refused(
    file: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    whole = file.read_bytes()
    cut = tmp_path_factory.mktemp("cut") / "cut.gguf"
    cut.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 65))])  # what pads the end is no loss
    with pytest.raises(BundleError, match=r"cut\.gguf is not a readable GGUF file: \S"):
        read_gguf(cut)


@given(at=st.integers(0, 700), value=st.binary(min_size=1, max_size=8))
def test_a_damaged_file_is_read_or_refused(
    file: Path, tmp_path_factory: pytest.TempPathFactory, at: int, value: bytes
) -> None:
    data = bytearray(file.read_bytes())
    data[at : at + len(value)] = value
    damaged = tmp_path_factory.mktemp("damaged") / "damaged.gguf"
    damaged.write_bytes(data)
    with suppress(BundleError):
        read_gguf(damaged)
