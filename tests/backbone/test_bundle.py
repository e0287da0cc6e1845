"""The bundle format: what is written is read, and whatever is not ours is refused with one line."""

import hashlib
import json
import shutil
from contextlib import suppress
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.lab import families
from wdmoe.backbone.export.export import ExportSettings, export_bundle
from wdmoe.backbone.format.bundle import (
    MANIFEST_NAME,
    MAX_READ_BYTES,
    Bundle,
    manifest_bytes,
    parse_manifest,
)
from wdmoe.backbone.format.onnx_graph import onnx
from wdmoe.errors import BundleError
from wdmoe.records import ExpertId


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle")
    source = families.save_tiny("mixtral", folder / "model", num_hidden_layers=2)
    export_bundle(source, folder / "bundle", ExportSettings(name="tiny"))
    return folder / "bundle"


@pytest.fixture
def copy(exported, tmp_path):
    """A bundle to spoil."""
    shutil.copytree(exported, tmp_path / "bundle")
    return tmp_path / "bundle"


def edit(bundle, change):
    """Apply `change` to the parsed manifest and write it back."""
    plain = json.loads((bundle / MANIFEST_NAME).read_text())
    change(plain)
    (bundle / MANIFEST_NAME).write_text(json.dumps(plain))


def refused(bundle, match):
    with pytest.raises(BundleError, match=match) as caught:
        Bundle.open(bundle)
    assert "\n" not in str(caught.value)


def test_opens_reads_and_verifies(exported):
    bundle = Bundle.open(exported)
    manifest = bundle.manifest
    assert (manifest.model, manifest.family, manifest.hidden, manifest.top_k) == ("tiny", "mixtral", 32, 2)
    assert manifest.moe_layers == (0, 1)
    assert manifest.experts_per_layer == {0: 8, 1: 8}
    assert manifest.digest == hashlib.sha256((exported / MANIFEST_NAME).read_bytes()).hexdigest()
    seen = []
    bundle.verify(lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] == sum(file.size for file in (*manifest.experts, *manifest.station))


def test_expert_is_read_in_parts(exported):
    bundle = Bundle.open(exported)
    file = bundle.expert_file(ExpertId(1, 7))
    whole = (exported / file.path).read_bytes()
    parts = [bundle.read_expert(file.id, at, 1000) for at in range(0, file.size, 1000)]
    assert b"".join(parts) == whole
    assert hashlib.sha256(whole).hexdigest() == file.sha256
    assert bundle.read_expert(file.id, file.size, 10) == b""


@pytest.mark.parametrize(("offset", "length"), [(-1, 5), (0, -1), (1 << 40, 1), (0, MAX_READ_BYTES + 1)])
def test_read_outside_of_an_expert_is_refused(exported, offset, length):
    with pytest.raises(BundleError, match="cannot read"):
        Bundle.open(exported).read_expert(ExpertId(0, 0), offset, length)


@pytest.mark.parametrize("expert", [ExpertId(2, 0), ExpertId(0, 8), ExpertId(-1, 0)])
def test_unknown_expert_is_refused(exported, expert):
    with pytest.raises(BundleError, match="no expert"):
        Bundle.open(exported).read_expert(expert, 0, 1)


def test_manifest_survives_a_round_trip(exported):
    data = (exported / MANIFEST_NAME).read_bytes()
    assert manifest_bytes(parse_manifest(data)) == data
    other = replace(parse_manifest(data), gate_temperature=2.5, on_drop="keep")
    assert parse_manifest(manifest_bytes(other)).gate_temperature == 2.5


def test_a_rank_is_written_only_where_it_is_not_the_gates_probability(exported):
    """So a bundle of before there was a choice is valid, and is made again byte by byte."""
    data = (exported / MANIFEST_NAME).read_bytes()
    assert b'"rank"' not in data
    manifest = parse_manifest(data)
    assert manifest.rank == "probability"
    other = manifest_bytes(replace(manifest, rank="energy"))
    assert b'"rank": "energy"' in other
    assert parse_manifest(other).rank == "energy"
    assert manifest_bytes(parse_manifest(other)) == other


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../000/000.onnx", "experts/000/../000/000.onnx", "experts\\000\\000.onnx", "C:/x", "a\0b"]
)
def test_path_tricks_of_experts_are_refused(copy, path):
    edit(copy, lambda plain: plain["experts"][0].update(path=path))
    refused(copy, "path")


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", "station/../manifest.json", "station//x", "station/a/b/c", "station\\x", "station/.x", "x", ""],
)
def test_path_tricks_of_the_station_are_refused(copy, path):
    edit(copy, lambda plain: plain["station"][0].update(path=path))
    refused(copy, "path")


def test_link_out_of_the_bundle_is_refused(copy, tmp_path):
    victim = copy / "experts/000/000.onnx"
    outside = tmp_path / "outside.onnx"
    victim.rename(outside)
    victim.symlink_to(outside)
    refused(copy, "leads outside")


def test_folder_link_out_of_the_bundle_is_refused(copy, tmp_path):
    (copy / "experts").rename(tmp_path / "elsewhere")
    (copy / "experts").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    refused(copy, "leads outside")


def test_loop_of_links_is_refused(copy):
    victim = copy / "experts/000/000.onnx"
    victim.unlink()
    victim.symlink_to(victim)
    refused(copy, "cannot be read")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda m: m.update(format_version=2), "format version 2"),
        (lambda m: m.update(extra=1), "unknown field 'extra'"),
        (lambda m: m.pop("family"), "lacks 'family'"),
        (lambda m: m.update(model="two\nlines"), "'model'"),
        (lambda m: m.update(hidden=True), "'hidden'"),
        (lambda m: m.update(hidden=0), "'hidden'"),
        (lambda m: m.update(top_k=9), "'top_k'"),
        (lambda m: m.update(precision="fp4"), "'precision'"),
        (lambda m: m.update(on_drop="guess"), "'on_drop'"),
        (lambda m: m.update(rank="luck"), "'rank' must be one of probability, energy"),
        (lambda m: m.update(rank=None), "'rank'"),
        (lambda m: m.update(on_drop=[]), "'on_drop'"),
        (lambda m: m.update(gate_temperature=0), "'gate_temperature'"),
        (lambda m: m.update(gate_temperature=float("nan")), "NaN"),
        (lambda m: m.update(experts_per_layer={"0": 8, "01": 8}), "layer numbers"),
        (lambda m: m.update(moe_layers=[1, 0]), "ascending"),
        (lambda m: m["experts"].pop(), "16 experts are announced, 15"),
        (lambda m: m["experts"].__setitem__(1, m["experts"][0]), "expert 1 of layer 0 is not listed"),
        (lambda m: m["experts"][0].update(sha256="0" * 63), "sha256"),
        (lambda m: m["experts"][0].update(note=""), "unknown field"),
        (lambda m: m["station"].append(m["station"][0]), "listed twice"),
        (lambda m: m.update(station=[]), "non-empty list"),
        (lambda m: m["experts"][0].update(size=1), "manifest says 1"),
    ],
)
def test_wrong_field_is_named(copy, change, match):
    edit(copy, change)
    refused(copy, match)


def test_name_that_stands_twice_is_refused(copy):
    text = (copy / MANIFEST_NAME).read_text()
    (copy / MANIFEST_NAME).write_text(text.replace("{", '{"model": "other", ', 1))
    refused(copy, "twice")


def test_missing_file_and_missing_manifest_are_refused(copy):
    (copy / "station/config.json").unlink()
    refused(copy, "config.json")
    (copy / MANIFEST_NAME).unlink()
    refused(copy, "not a bundle")


def test_tampered_file_is_found(copy):
    victim = copy / "experts/001/003.onnx"
    data = bytearray(victim.read_bytes())
    data[-40] ^= 1
    victim.write_bytes(data)
    bundle = Bundle.open(copy)  # same size: opening can't tell
    with pytest.raises(BundleError, match=r"experts/001/003\.onnx is not what the manifest says"):
        bundle.verify()


def test_one_expert_is_read_whole_and_proven(copy):
    bundle = Bundle.open(copy)
    first, other = ExpertId(0, 0), ExpertId(1, 3)
    assert bundle.expert_bytes(first) == (copy / "experts/000/000.onnx").read_bytes()
    victim = copy / "experts/001/003.onnx"
    victim.write_bytes(victim.read_bytes()[:-1] + b"!")
    with pytest.raises(BundleError, match=r"experts/001/003\.onnx is not what the manifest says"):
        bundle.expert_bytes(other)


@pytest.mark.parametrize(
    "norm",
    [None, 3, [], [1], [1, 2, 3], [2, 1], [-1, 1], [True, 2], ["1", "2"], {"low": 1}, [1, 10**400]],
)
def test_bounds_of_outputs_that_make_no_sense_are_refused(copy, norm):
    edit(copy, lambda plain: plain["experts"][0].update(output_norm=norm))
    with pytest.raises(BundleError, match="output_norm"):
        Bundle.open(copy)


def test_a_number_beyond_all_floats_is_refused(copy):
    edit(copy, lambda plain: plain.update(gate_temperature=10**400))
    with pytest.raises(BundleError, match="gate_temperature"):
        Bundle.open(copy)


def test_bounds_of_outputs_are_optional(copy):
    assert all(file.output_norm is not None for file in Bundle.open(copy).manifest.experts)
    edit(copy, lambda plain: [file.pop("output_norm") for file in plain["experts"]])
    bundle = Bundle.open(copy)
    assert all(file.output_norm is None for file in bundle.manifest.experts)
    assert b"output_norm" not in manifest_bytes(bundle.manifest)


def replace_expert(bundle, model):
    """Put a graph in an expert's place, with a manifest that agrees with it."""
    data = model.SerializeToString()
    (bundle / "experts/000/000.onnx").write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    edit(bundle, lambda plain: plain["experts"][0].update(size=len(data), sha256=digest))


def add_operator(model):
    model.graph.node.add(op_type="Loop", input=["x"], output=["z"])


def add_custom_operator(model):
    model.graph.node.add(op_type="MatMul", domain="com.example", input=["x"], output=["z"])


def raise_opset(model):
    model.opset_import[0].version = 21


def add_function(model):
    model.functions.add(name="f", domain="d")


def move_weights_out(model):
    tensor = model.graph.initializer[0]
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")


def rename_input(model):
    model.graph.input[0].name = "z"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (add_operator, "'Loop'"),
        (add_custom_operator, "not on the list"),
        (raise_opset, "opset"),
        (add_function, "functions"),
        (move_weights_out, "outside of its file"),
        (rename_input, "must map x"),
    ],
)
def test_graph_that_is_not_ours_is_refused(copy, change, match):
    model = onnx.load_model(copy / "experts/000/000.onnx")
    change(model)
    replace_expert(copy, model)
    with pytest.raises(BundleError, match=match):
        Bundle.open(copy).verify()


@given(
    st.binary(max_size=200) | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(repr).map(str.encode)
)
def test_garbage_is_refused_not_crashed_on(data):
    with pytest.raises(BundleError):
        parse_manifest(data)


@given(st.data())
def test_changed_manifest_is_refused_or_read(exported, data):
    plain = json.loads((exported / MANIFEST_NAME).read_text())
    name = data.draw(st.sampled_from(sorted(plain)))
    values = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.integers())
    plain[name] = data.draw(values | st.dictionaries(st.text(), st.integers()))
    with suppress(BundleError):
        assert parse_manifest(json.dumps(plain).encode()).digest
