"""The comparison of training losses: a tiny one by its tool, interrupted ones, and the folder that holds them."""

import csv
import hashlib
import json
import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from tests.lab.made_up_pictures import made_up
from tests.lab.one_thread import one_thread
from wdmoe.broadcast.codec.model import BroadcastCodec, ModelSettings
from wdmoe.broadcast.codec.model_file import load_model, save_model
from wdmoe.broadcast.study.loss_plan import LossPlan, Pool
from wdmoe.broadcast.study.loss_results import start_losses, verify_losses
from wdmoe.broadcast.study.loss_study import LossStudy
from wdmoe.broadcast.study.loss_tables import loss_texts
from wdmoe.broadcast.study.results import ARRAYS, fronts_of
from wdmoe.broadcast.training.batches import Draws
from wdmoe.broadcast.training.initialisation import untrained
from wdmoe.broadcast.training.losses import LOSSES
from wdmoe.broadcast.training.training import Training
from wdmoe.cli.models import verify
from wdmoe.errors import ConfigError, WdmoeError
from wdmoe.results.folder import MANIFEST, read_manifest, sha256_of

__all__ = ["one_thread"]
TOOL = Path(__file__).resolve().parents[2] / "tools" / "study" / "broadcast_losses"
SMALL = ModelSettings(side=16, width=8, heads=2, encoder_depth=1, decoder_depth=1, condition=8)
TINY = ("--steps", "2", "--batch", "4", "--pictures", "4", "--points", "3", "--curve-pairs", "2", "--save-every", "1")
SYSTEMS = {*LOSSES, "start"}


@pytest.fixture(scope="module")
def pool():
    """Two classes of 12 small pictures, half of each to train on."""
    numbers = np.arange(24)
    pixels, first = made_up(24)[:, ::2, ::2], numbers % 12 < 6
    return Pool(pixels=pixels, labels=numbers // 12, train=numbers[first], choose=numbers[~first])


@pytest.fixture(scope="module")
def tool(pool):
    """The tool's `main` on made-up pictures."""
    before = torch.are_deterministic_algorithms_enabled()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        main = runpy.run_path(str(TOOL))["main"]
        patch.setitem(main.__globals__, "known_pool", lambda: pool)
        yield main
    torch.use_deterministic_algorithms(before)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A file to begin with."""
    torch.manual_seed(3)
    file = tmp_path_factory.mktemp("model") / "model.safetensors"
    save_model(BroadcastCodec(SMALL), file)
    return file


@pytest.fixture(scope="module")
def folder(tool, model, tmp_path_factory):
    out = tmp_path_factory.mktemp("losses") / "out"
    tool([str(out), *TINY, "--begin", str(model)])
    return out


def study_of(folder, pool, model, progress=lambda what, done: None):
    """What the tool runs with `TINY`."""
    plan = LossPlan(
        training=Training(steps=2, save_every=1),
        draws=Draws(batch=4),
        model=SMALL,
        begin="" if model is None else sha256_of(model),
        pictures=4,
        points=3,
        curve_pairs=2,
    )
    folder.mkdir(exist_ok=True)
    return LossStudy(folder, plan, pool, torch.device("cpu"), progress, model and load_model(model))


def interrupting(stop):
    """Progress that ends all as a kill would, half through what is named."""

    def reach(what, done):
        if what.startswith(stop) and done >= 0.5:
            raise KeyboardInterrupt

    return reach


def measured(study):
    models = study.train()
    return models, study.measure(models, study.parts(models))


def copied(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def rewritten(folder, name, data):
    """As someone would who also mends the manifest."""
    (folder / name).write_bytes(data)
    manifest = read_manifest(folder)
    manifest["files"][name] = hashlib.sha256(data).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(manifest))


def test_the_tool_measures_every_loss_and_what_they_began_with(folder, model):
    with (folder / "losses.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6 * len(SYSTEMS)
    assert {row["system"] for row in rows} == SYSTEMS
    for row in rows:
        assert (row["lead_area"] == "") == (row["system"] == "sum")
        assert float(row["area_low"]) <= float(row["area"]) <= float(row["area_high"])
    base = {row["setting"]: float(row["area"]) for row in rows if row["system"] == "sum"}
    for row in (row for row in rows if row["system"] != "sum"):
        assert float(row["lead_area"]) == pytest.approx(float(row["area"]) - base[row["setting"]], abs=2e-5)
    with (folder / "curves.csv").open(newline="") as file:
        steps = [(row["system"], float(row["step"])) for row in csv.DictReader(file)]
    assert steps == [*((loss, step) for loss in LOSSES for step in (1, 2)), ("start", 0)]
    page = (folder / "losses.md").read_text()
    assert "--steps 2 --batch 4" in page
    assert read_manifest(folder)["plan"]["begin"] == sha256_of(model)
    assert {"losses.png", "losses.svg", "qualities.npz"} <= set(read_manifest(folder)["files"])
    assert not list(folder.glob("part-*"))


def test_losses_begin_alike_and_end_apart(folder, model):
    assert (folder / "start" / "model.safetensors").read_bytes() == model.read_bytes()
    ends = {(folder / name / "model.safetensors").read_bytes() for name in SYSTEMS}
    assert len(ends) == len(SYSTEMS)


def test_a_folder_verifies_with_weights_and_without(folder, pool, tmp_path):
    checked = verify_losses(folder, 1, pool=pool)
    assert (set(checked.systems), checked.settings, checked.pairs) == (SYSTEMS, 6, 1)
    for file in (each for each in folder.iterdir() if each.is_file()):
        shutil.copy(file, tmp_path)
    result = CliRunner().invoke(verify, [str(tmp_path)])
    assert result.exit_code == 0, result.exception
    assert "nothing was run again" in result.output


def test_a_changed_file_is_named(folder, pool, tmp_path):
    changed = copied(folder, tmp_path)
    text = (changed / "losses.csv").read_text()
    (changed / "losses.csv").write_text(text.replace("1", "2", 1))
    result = CliRunner().invoke(verify, [str(changed)])
    assert isinstance(result.exception, ConfigError)
    assert "losses.csv was changed" in str(result.exception)
    rewritten(changed, "losses.csv", text.replace("1", "2", 1).encode())
    with pytest.raises(ConfigError, match=r"losses\.csv does not follow"):
        verify_losses(changed, 1, pool=pool)
    rewritten(changed, "losses.csv", text.encode())
    (changed / "sum" / "model.safetensors").write_bytes((changed / "region" / "model.safetensors").read_bytes())
    with pytest.raises(ConfigError, match="not the file that was measured"):
        verify_losses(changed, 1, pool=pool)


def test_other_steps_in_the_manifest_do_not_go_with_the_page(folder, pool, tmp_path):
    changed = copied(folder, tmp_path)
    manifest = read_manifest(changed)
    manifest["plan"]["training"]["steps"] = 4000
    (changed / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match=r"losses\.md does not follow"):
        verify_losses(changed, 1, pool=pool)
    del manifest["plan"]["points"]
    (changed / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match="sound plan"):
        verify_losses(changed, 1, pool=pool)


def test_better_figures_everywhere_are_found_by_running_again(folder, pool, tmp_path):
    changed = copied(folder, tmp_path)
    with np.load(changed / ARRAYS) as arrays:
        better = {key: value + 0.5 if key.endswith("region|quality") else value for key, value in arrays.items()}
    np.savez_compressed(changed / ARRAYS, **better)
    rewritten(changed, ARRAYS, (changed / ARRAYS).read_bytes())
    for name, text in loss_texts(fronts_of(changed / ARRAYS), read_manifest(changed)).items():
        rewritten(changed, name, text.encode())
    with pytest.raises(ConfigError, match="running it again gives"):
        verify_losses(changed, 1, pool=pool)


def test_an_interrupted_comparison_ends_like_one_that_was_not(folder, pool, model, tmp_path):
    out = tmp_path / "out"
    for stop in ("weighted, train", "region, different class"):
        with pytest.raises(KeyboardInterrupt):
            measured(study_of(out, pool, model, interrupting(stop)))
    assert 0 < len(list(out.glob("part-*"))) < 6 * len(SYSTEMS)
    start_losses(out)  # what an interrupted run leaves is no other file
    models, found = measured(study_of(out, pool, model))
    for name, file in models.items():
        assert file.read_bytes() == (folder / name / "model.safetensors").read_bytes(), name
    for setting, fronts in fronts_of(folder / ARRAYS).items():
        assert all(np.array_equal(fronts[name].psnr_db, found[setting][name].psnr_db) for name in SYSTEMS)


def test_without_a_model_to_begin_with_it_is_the_linear_code_of_the_pictures(pool, tmp_path):
    study = study_of(tmp_path, pool, None, interrupting("sum, train"))
    with pytest.raises(KeyboardInterrupt):
        study.train()
    begun = load_model(tmp_path / "start" / "model.safetensors").state_dict()
    expected = untrained(SMALL, pool.pixels[pool.train], 0).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in begun.items())
    assert study.plan.command().endswith("--seed 0 --begin none")


@pytest.mark.parametrize("flags", [("--seed", "1"), ("--steps", "3")])
def test_a_folder_of_other_settings_is_left_alone(tool, folder, model, flags):
    before = (folder / MANIFEST).read_bytes()
    with pytest.raises(ConfigError, match="other settings"):
        tool([str(folder), *TINY, "--begin", str(model), *flags])
    assert (folder / MANIFEST).read_bytes() == before
    assert (folder / "start" / "model.safetensors").read_bytes() == model.read_bytes()


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--steps", "0"), "steps"),
        (("--batch", "0"), "batch"),
        (("--pictures", "7"), "pictures must be a multiple"),
        (("--points", "1"), "points"),
        (("--curve-pairs", "0"), "--curve-pairs"),
        (("--seed", "-1"), "seed"),
        (("--begin", "no-such-file"), "no-such-file"),
    ],
)
def test_flags_that_make_no_sense_are_named_before_anything_is_done(tool, tmp_path, flags, named):
    with pytest.raises(WdmoeError, match=named) as caught:
        tool([str(tmp_path / "out"), *TINY, *flags])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_folder_with_something_else_is_left_alone(tool, model, tmp_path):
    (tmp_path / "letter").write_text("dear")
    with pytest.raises(ConfigError, match="other files"):
        tool([str(tmp_path), *TINY, "--begin", str(model)])
    assert [file.name for file in tmp_path.iterdir()] == ["letter"]
