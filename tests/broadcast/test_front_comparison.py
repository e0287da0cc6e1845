"""Every system in the same noise, fronts to figures, and the folder that holds them."""

import hashlib
import json
import re
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from tests.lab.made_up_pictures import made_up, made_up_material
from tests.lab.one_thread import one_thread
from wdmoe.broadcast.baselines import bitrate_ladders as ladders_module
from wdmoe.broadcast.baselines.bitrate_ladders import kept_ladders
from wdmoe.broadcast.baselines.classical import SCHEMES
from wdmoe.broadcast.baselines.classical_fading import TOLD_BLOCKS, TOLD_MEAN
from wdmoe.broadcast.baselines.codecs import Jpeg2000
from wdmoe.broadcast.baselines.single_user import Scrambler, sent_alone, sent_once, superposition, time_division
from wdmoe.broadcast.codec.model import BroadcastCodec, ModelSettings
from wdmoe.broadcast.codec.model_file import load_model, save_model
from wdmoe.broadcast.quality.alpha_sweep import alpha_sweep
from wdmoe.broadcast.quality.channel_draws import Radio
from wdmoe.broadcast.quality.front_comparison import equal_quality, lead_along, leads, standings
from wdmoe.broadcast.quality.metrics import psnr_db
from wdmoe.broadcast.quality.pareto_front import Front, front_of
from wdmoe.broadcast.study import study as study_module
from wdmoe.broadcast.study.four_users import ALONE, run_four
from wdmoe.broadcast.study.jobs import measure_all
from wdmoe.broadcast.study.photographs import (
    HEIGHT,
    SOURCES,
    WHOLE,
    WIDTH,
    load_photographs,
    tile_pairs,
    tiled,
    untiled,
)
from wdmoe.broadcast.study.results import ARRAYS, Parts, Plan, fronts_of, save_results, start_folder
from wdmoe.broadcast.study.study import JOINT, ONCE, Setting, Study, all_settings
from wdmoe.broadcast.study.tables import texts_of
from wdmoe.broadcast.study.verify import verify_results
from wdmoe.cli.models import verify
from wdmoe.errors import ConfigError, MissingExtraError
from wdmoe.results.folder import MANIFEST

__all__ = ["one_thread"]
SMALL = ModelSettings(width=16, heads=2, encoder_depth=1, decoder_depth=1, condition=8)
RADIO = Radio(snr_db=(10.0, 5.0))
PAIRS = np.array([[0, 1], [2, 3], [1, 0]])
BLANK = np.full((32, 32, 3), 128, dtype=np.uint8)


@pytest.fixture(scope="module")
def codec():
    torch.manual_seed(3)
    return BroadcastCodec(SMALL).eval()


@pytest.fixture(scope="module")
def pixels():
    return made_up(4)


def front(*means, pairs=5, seed=0):
    """Points of these means; pairs differ by what is the same at all points."""
    off = np.random.default_rng(seed).normal(0, 1, pairs)
    off -= off.mean()
    values = np.array(means, dtype=float)[:, None, :] + off[None, :, None]
    return front_of(np.linspace(0, 1, len(means)), np.stack([values, values / 40, values / 40], axis=-1))


def test_draws_belong_to_user_and_picture_whatever_else_there_is():
    together = RADIO.draws(PAIRS, 16, 4)
    alone = RADIO.draws(PAIRS[1:2], 16, 4)
    assert torch.equal(together.noise[1:2], alone.noise)
    assert torch.equal(RADIO.draws(PAIRS[:, 1:], 16, 4, first_user=1).noise, together.only(1).noise)
    assert not torch.equal(together.noise[0, 0], together.noise[0, 1])
    swapped = RADIO.draws(PAIRS[:, ::-1].copy(), 16, 4)
    assert not torch.equal(swapped.noise[0, 0], together.noise[0, 1])  # same picture, other user
    many = RADIO.draws(np.arange(60)[:, None], 64, 16).noise
    np.testing.assert_allclose(many.square().mean(dim=(0, 1, 2, 3)), [0.5, 0.5], rtol=0.03)


def test_a_part_of_the_pairs_gives_what_all_of_them_give(codec, pixels):
    whole = alpha_sweep(codec, pixels, PAIRS, (0.3, 0.7), RADIO, 8)
    part = alpha_sweep(codec, pixels, PAIRS[:1], (0.3, 0.7), RADIO, 8)
    np.testing.assert_allclose(part.psnr_db, whole.of(slice(0, 1)).psnr_db, atol=0.01)
    assert whole.psnr_db.shape == whole.ssim.shape == (2, 3, 2)
    assert np.isnan(whole.ms_ssim).all()


def test_at_the_ends_every_baseline_sends_one_picture_alone(codec, pixels):
    alone = sent_alone(codec, pixels, np.arange(4), RADIO, 4, BLANK)
    turns = time_division(alone, alone.hulls(), PAIRS, (0.0, 0.5, 1.0))
    layers = superposition(codec, pixels, PAIRS, (0.0, 1.0), RADIO, 4, BLANK)
    for user, end in ((0, -1), (1, 0)):
        own, other = PAIRS[:, user], PAIRS[:, 1 - user]
        np.testing.assert_allclose(turns.psnr_db[end, :, user], alone.found[user, -1, own, 0])
        np.testing.assert_allclose(layers.psnr_db[end, :, 0], turns.psnr_db[end, :, 0], atol=0.05)
        np.testing.assert_allclose(turns.psnr_db[end, :, 1 - user], psnr_db(pixels[other], BLANK[None].repeat(3, 0)))
    middle = turns.psnr_db.mean(axis=1)[1]
    assert np.all(middle >= alone.found[..., 0].mean(axis=2)[:, 0] - 1e-9)


def test_time_division_alternates_along_the_hull(codec, pixels):
    alone = sent_alone(codec, pixels, np.arange(4), RADIO, 4, BLANK)
    alone.found[:, 1, :, 0] = 0  # a number of slots that the codec is bad at
    hulls = alone.hulls()
    assert all(1 not in hull and hull[0] == 0 and hull[-1] == 4 for hull in hulls)
    quarter = time_division(alone, hulls, PAIRS, (0.25,)).psnr_db[0, :, 0]
    following = hulls[0][1]
    own = alone.found[0][:, PAIRS[:, 0], 0]
    np.testing.assert_allclose(quarter, own[0] + (own[following] - own[0]) / following)


def test_scrambling_keeps_power_and_can_be_undone():
    symbols = torch.randn(2, 64, 16, 2, generator=torch.Generator().manual_seed(0))
    symbols[:, :, 8:] = 0
    scrambler = Scrambler(64, 8)
    mixed = scrambler.mix(symbols)
    torch.testing.assert_close(scrambler.undo(mixed), symbols)
    torch.testing.assert_close(mixed.square().sum(), symbols.square().sum())
    assert torch.all(mixed[:, :, 8:] == 0)
    assert not torch.allclose(mixed, symbols)


def test_one_block_for_both_serves_the_stronger_user_better(codec, pixels):
    once = sent_once(codec, pixels, np.arange(4), RADIO, 8, 3)
    means = once.psnr_db.mean(axis=1)
    assert means.shape == (3, 2)
    assert np.all(means[:, 0] > means[:, 1])


def test_subtraction_is_for_steady_channels(codec, pixels):
    minus = superposition(codec, pixels, PAIRS, (0.5,), RADIO, 4, BLANK, subtract=True)
    plain = superposition(codec, pixels, PAIRS, (0.5,), RADIO, 4, BLANK)
    assert np.array_equal(minus.psnr_db[..., 1], plain.psnr_db[..., 1])  # the weaker user does nothing
    assert not np.array_equal(minus.psnr_db[..., 0], plain.psnr_db[..., 0])
    with pytest.raises(ConfigError, match="steady"):
        superposition(codec, pixels, PAIRS, (0.5,), Radio(snr_db=(10, 5), csi_error=0.1), 4, BLANK, subtract=True)
    with pytest.raises(ConfigError, match="-30 to 40"):
        Radio(snr_db=(10.0, float("nan")))


def test_equal_quality_lies_where_a_front_crosses():
    assert equal_quality([[10, 20], [14, 12]]) == pytest.approx(10 + 4 * 10 / 12)
    assert equal_quality([[20, 30], [22, 28]]) == 22  # the first user is always the worse one
    assert equal_quality([[15, 15]]) == 15
    assert equal_quality([[[10, 20], [20, 10]], [[11, 21], [21, 11]]]).tolist() == [15, 16]


def test_a_front_moved_up_leads_by_as_much():
    means = [(10, 26), (18, 23), (22, 19), (25, 11)]
    fronts = {"moved": front(*((a + 1, b + 1) for a, b in means)), "plain": front(*means)}
    lead = leads(fronts, "moved")["plain"]
    for edge in (lead.equal_db.value, lead.equal_db.low, lead.equal_db.high):
        assert edge == pytest.approx(1, abs=1e-6)
    assert lead.ahead == 1
    assert lead.least_db > 0
    assert lead.area.low > 0
    back = leads(fronts, "plain")["moved"]
    assert back.equal_db.value == pytest.approx(-1)
    assert back.ahead == 0
    assert not back.apart
    stood = standings(fronts)
    assert stood["moved"].area.low <= stood["moved"].area.value <= stood["moved"].area.high
    assert stood["moved"].ssim_area.value > 0


def test_where_fronts_cross_the_lead_changes_sign():
    levels, lead = lead_along(front((12, 24), (24, 12)), front((12, 26), (18, 18), (22, 12)))
    assert lead[0] == pytest.approx(-2)
    assert levels[-1] == pytest.approx(22)
    assert lead[-1] == pytest.approx(2)


def test_ladders_come_from_the_cache_the_second_time(pixels, tmp_path, monkeypatch):
    codec, wanted = Jpeg2000(rungs=6, levels=(3,)), {number: pixels[number] for number in range(3)}
    built = kept_ladders(codec, {0: wanted[0]}, BLANK, 1500, folder=tmp_path)
    asked = []
    real = ladders_module.build_ladder
    monkeypatch.setattr(ladders_module, "build_ladder", lambda *what: (asked.append(1), real(*what))[1])
    more = kept_ladders(codec, wanted, BLANK, 1500, folder=tmp_path)
    assert len(asked) == 2
    again = kept_ladders(codec, wanted, BLANK, 1500, folder=tmp_path)
    assert len(asked) == 2
    for number in wanted:
        assert np.array_equal(more[number].bits, again[number].bits)
        assert np.array_equal(more[number].psnr_db, again[number].psnr_db)
    assert np.array_equal(built[0].ssim, again[0].ssim)
    kept_ladders(Jpeg2000(rungs=7, levels=(3,)), {0: wanted[0]}, BLANK, 1500, folder=tmp_path)
    assert len(asked) == 3  # other settings, another file
    for file in tmp_path.iterdir():
        file.write_bytes(b"damaged")
    assert np.array_equal(kept_ladders(codec, wanted, BLANK, 1500, folder=tmp_path)[1].bits, again[1].bits)
    for file in list(tmp_path.iterdir()):  # what cannot be opened is not built anew over it
        file.unlink()
        file.mkdir()
    with pytest.raises(ConfigError, match="cannot read"):
        kept_ladders(codec, wanted, BLANK, 1500, folder=tmp_path)


def test_photographs_in_tiles_are_judged_as_a_whole(tmp_path):
    photographs = np.random.default_rng(0).integers(0, 256, (2, HEIGHT, WIDTH, 3)).astype(np.uint8)
    tiles = tiled(photographs)
    assert np.array_equal(untiled(tiles), photographs)
    assert np.array_equal(tiles[96 + 13], photographs[1, 32:64, 32:64])
    assert tile_pairs([[0, 1]])[13].tolist() == [13, 96 + 13]
    darker = photographs // 2
    found = WHOLE.qualities(tiles[:96], tiled(darker)[:96])
    assert found.shape == (96, 3)
    np.testing.assert_allclose(found[:, 0], psnr_db(photographs[0], darker[0]))
    assert np.isfinite(found).all()
    with pytest.raises(MissingExtraError, match="fetch_photographs"):
        load_photographs(tmp_path)
    (tmp_path / SOURCES[0].file).write_bytes(b"another picture")
    with pytest.raises(ConfigError, match=SOURCES[0].file):
        load_photographs(tmp_path)


def test_the_settings_are_those_that_were_asked_for():
    settings = all_settings(1000, 100)
    assert len({each.name for each in settings}) == len(settings) == 29
    assert sum(each.pictures == 1000 for each in settings) == 3
    assert {each.csi_error for each in settings} == {None, 0.0, 0.05, 0.1, 0.2}


PLAN = Plan(pictures=4, few=4, points=3, classical=("jpeg2000",), photographs=False)
FADED = "different class, 4 pictures, 10/5 dB, CBR 1/6, Rayleigh, CSI error 0.1"


@contextmanager
def short_sweeps():
    """Of all sweeps only CSI errors, two of them."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"SNR_PAIRS_DB": (), "CBRS": (), "GAPS_DB": (), "CSI_ERRORS": (0.0, 0.1)}.items():
            patch.setattr(study_module, name, value)
        yield


@pytest.fixture
def short():
    with short_sweeps():
        yield


@pytest.fixture(scope="module")
def material():
    return made_up_material(classes=2, each=4)


@pytest.fixture(scope="module")
def folder(codec, material, tmp_path_factory):
    with short_sweeps():
        return results_folder(codec, material, tmp_path_factory.mktemp("results"))


def results_folder(codec, material, made):
    weights = made / "weights.safetensors"
    save_model(codec, weights)
    stored = load_model(weights)
    study = Study(material=material, joint=stored, single=stored, classical=("jpeg2000",), cache=made / "cache")
    results = {each.name: study.run(each) for each in PLAN.settings()}
    four = run_four(study, 4)
    assert set(four) > {ALONE}
    assert all(each.psnr_db.shape == (4, 4) for each in four.values())
    out = made / "out"
    start_folder(out)
    models = dict.fromkeys(("codec.safetensors", "single.safetensors"), weights)
    page = save_results(out, PLAN, models, results, {}, four, {"took": {}})
    assert JOINT in page
    assert "Four users" in page
    return out


def copied(folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def rewritten(folder, name, data):
    """As someone would who also mends the manifest."""
    (folder / name).write_bytes(data)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"][name] = hashlib.sha256(data).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(manifest))


def test_a_results_folder_verifies(short, folder, material):
    checked = verify_results(folder, 2, material=material)
    assert (checked.settings, checked.pairs, checked.photographs) == (5, 2, False)
    assert {"regions-psnr.png", "regions-psnr.svg", "hypervolumes.png", "sweep-csi.svg"} <= {
        file.name for file in folder.iterdir()
    }


def test_a_changed_file_is_named(folder, tmp_path):
    changed = copied(folder, tmp_path)
    (changed / "fronts.csv").write_text((changed / "fronts.csv").read_text().replace("1", "2", 1))
    result = CliRunner().invoke(verify, [str(changed)])
    assert isinstance(result.exception, ConfigError)
    assert "fronts.csv was changed" in str(result.exception)


def test_figures_that_do_not_come_out_again_are_named(short, folder, material, tmp_path):
    changed = copied(folder, tmp_path)
    page = (changed / "results.md").read_text()
    rewritten(changed, "results.md", page.replace("joint", "magic").encode())
    with pytest.raises(ConfigError, match=r"results\.md does not follow"):
        verify_results(changed, 1, material=material)
    rewritten(changed, "results.md", page.encode())
    with np.load(changed / ARRAYS) as arrays:
        other = dict(arrays)
    np.savez_compressed(changed / ARRAYS, **{key: value + 0.5 for key, value in other.items()})
    rewritten(changed, ARRAYS, (changed / ARRAYS).read_bytes())
    with pytest.raises(ConfigError, match="does not follow"):
        verify_results(changed, 1, material=material)


@pytest.mark.parametrize("chosen", [JOINT, f"{FADED}|JPEG 2000, {TOLD_MEAN}, superposition"])
def test_better_figures_everywhere_are_found_by_running_again(short, folder, material, tmp_path, chosen):
    changed = copied(folder, tmp_path)
    with np.load(changed / ARRAYS) as arrays:
        better = {key: value + 0.5 if "quality" in key and chosen in key else value for key, value in arrays.items()}
    np.savez_compressed(changed / ARRAYS, **better)
    rewritten(changed, ARRAYS, (changed / ARRAYS).read_bytes())
    for name, text in texts_of(fronts_of(changed / ARRAYS), PLAN.main()).items():
        rewritten(changed, name, text.encode())
    with pytest.raises(ConfigError, match=f"{re.escape(chosen.replace('|', ', '))}.*running it again gives"):
        verify_results(changed, 1, material=material)


def test_fading_settings_have_classical_systems_of_both_kinds(folder):
    systems = fronts_of(folder / ARRAYS)[FADED]
    classical = {f"JPEG 2000, {told}, {scheme}" for told in (TOLD_MEAN, TOLD_BLOCKS) for scheme in SCHEMES}
    assert {name for name in systems if name.startswith("JPEG")} == classical
    assert all(each.psnr_db.shape == systems[JOINT].psnr_db.shape for each in systems.values())
    row = next(line for line in (folder / "results.md").read_text().splitlines() if FADED in line)
    assert re.search(rf"JPEG 2000, {TOLD_MEAN}, [^|]*<br>JPEG 2000, {TOLD_BLOCKS}, ", row)


def test_one_picture_for_both_fades_too(codec, material, tmp_path):
    study = Study(material=material, joint=codec, single=codec, classical=("jpeg2000",), cache=tmp_path)
    fronts = study.run(Setting(kind="same picture", pictures=4, csi_error=0.1, points=2), 2)
    assert {f"JPEG 2000, {told}, {ONCE}" for told in (TOLD_MEAN, TOLD_BLOCKS)} < set(fronts)
    assert all(each.psnr_db.shape[1:] == (2, 2) for each in fronts.values())


def test_results_of_an_older_program_are_refused(folder, tmp_path):
    older = copied(folder, tmp_path)
    manifest = json.loads((older / MANIFEST).read_text())
    (older / MANIFEST).write_text(json.dumps(manifest | {"format": 1}))
    with pytest.raises(ConfigError, match="format 2"):
        verify_results(older)


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    (tmp_path / "letter").write_text("dear")
    with pytest.raises(ConfigError, match="other files"):
        start_folder(tmp_path)
    (tmp_path / "part-1.npz").write_bytes(b"")
    start_folder(tmp_path)  # cut off while it wrote its results: it goes on
    with pytest.raises(ConfigError, match="classical"):
        Plan(classical=("gif",))


def test_front_of_keeps_its_axes():
    values = np.arange(2 * 3 * 2 * 3, dtype=float).reshape(2, 3, 2, 3)
    made = front_of([0, 1], values)
    assert isinstance(made, Front)
    assert made.ssim[1, 2, 0] == values[1, 2, 0, 1]
    assert made.of([2]).psnr_db.shape == (2, 1, 2)


def test_several_processes_measure_what_one_does(codec, material, tmp_path):
    study = Study(material=material, joint=codec, single=codec, classical=("jpeg2000",), cache=tmp_path / "ladders")
    settings = [Setting(kind="different class", pictures=4, points=2), Setting(kind="same picture", pictures=4)]
    study.prepare(settings)
    found = []
    for jobs in (1, 2):
        folder, told = tmp_path / str(jobs), []
        folder.mkdir()
        parts = Parts(folder, PLAN, {})
        found.append(measure_all(study, parts, settings, jobs, lambda what, _done, told=told: told.append(what)))
        assert set(told) == {each.name for each in settings}
        assert all(parts.holds(each.name) for each in settings)
    one, other = found
    assert list(one) == list(other) == [each.name for each in settings]
    for name, fronts in one.items():
        for system, front in fronts.items():
            np.testing.assert_allclose(other[name][system].psnr_db, front.psnr_db, atol=1e-3, err_msg=system)
