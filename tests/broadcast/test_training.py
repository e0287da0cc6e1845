"""Training, a few steps of a tiny model on made-up pictures: repeatable, resumable, alike for any number of parts."""

import json

import numpy as np
import pytest
import torch

from tests.lab.one_thread import one_thread
from wdmoe.broadcast.codec.model import BroadcastCodec, ModelSettings, as_pictures, as_pixels
from wdmoe.broadcast.codec.model_file import load_model, save_model
from wdmoe.broadcast.quality.alpha_sweep import alpha_sweep
from wdmoe.broadcast.quality.channel_draws import Radio
from wdmoe.broadcast.training.batches import BatchSource, Draws
from wdmoe.broadcast.training.run_folder import MODEL, write_results, write_settings
from wdmoe.broadcast.training.training import Team, Trainer, Training, fingerprint_of
from wdmoe.errors import BundleError, ConfigError
from wdmoe.results.folder import MANIFEST

__all__ = ["one_thread"]
MODEL_SETTINGS = ModelSettings(side=16, width=16, heads=2, encoder_depth=1, decoder_depth=1, condition=8)
CPU = torch.device("cpu")
SIDE, TOKENS = 16, 16


@pytest.fixture(scope="module")
def pixels():
    """Flat pictures: what a tiny model can learn in a few steps."""
    levels = np.random.default_rng(0).integers(0, 256, (40, 1, 1, 3))
    return np.broadcast_to(levels, (40, SIDE, SIDE, 3)).astype(np.uint8)


LABELS = np.repeat(np.arange(4), 10)


def source_of(pixels, **draws):
    return BatchSource(pixels, LABELS, Draws(batch=8, **draws), TOKENS, MODEL_SETTINGS.slots)


def trained(pixels, file, training, stop=None, **draws):
    """A trainer that took its steps; `stop` interrupts it there, as a kill would."""
    torch.manual_seed(7)
    trainer = Trainer(BroadcastCodec(MODEL_SETTINGS), source_of(pixels, **draws), training, Team())
    mark = fingerprint_of(training, MODEL_SETTINGS)
    trainer.restore(file, mark)

    def interrupt(_what, _done):
        if trainer.step == stop:
            raise KeyboardInterrupt

    trainer.run(file, mark, lambda codec: {"weights": float(sum(p.sum() for p in codec.parameters()))}, interrupt)
    return trainer


def test_a_run_that_was_interrupted_ends_like_one_that_was_not(pixels, tmp_path):
    training = Training(steps=4, save_every=2, learning_rate=1e-3)
    whole = trained(pixels, tmp_path / "whole", training)
    with pytest.raises(KeyboardInterrupt):
        trained(pixels, tmp_path / "cut", training, stop=3)
    rest = trained(pixels, tmp_path / "cut", training)
    assert rest.curve == whole.curve
    assert [row["step"] for row in whole.curve] == [2, 4]
    for one, other in zip(rest.averaged.parameters(), whole.averaged.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_file_of_another_run_or_a_broken_one_is_refused(pixels, tmp_path):
    file = tmp_path / "state"
    trained(pixels, file, Training(steps=1))
    with pytest.raises(ConfigError, match="other settings"):
        trained(pixels, file, Training(steps=1, loss="sum"))
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ConfigError, match="cannot be read; delete it"):
        trained(pixels, file, Training(steps=1))
    file.unlink()
    file.mkdir()  # what cannot be opened is not called damaged: nobody should delete hours of training for that
    with pytest.raises(ConfigError, match="cannot be read: "):
        trained(pixels, file, Training(steps=1))


@pytest.mark.parametrize("loss", ["sum", "weighted", "region"])
def test_every_loss_falls(pixels, tmp_path, loss):
    training = Training(steps=10, save_every=2, learning_rate=5e-3, loss=loss, average=0.5)
    curve = trained(pixels, tmp_path / loss, training).curve
    assert curve[-1]["loss"] < curve[0]["loss"]


def test_parts_of_the_processes_make_the_batch_of_one(pixels):
    source = source_of(pixels, fading="rayleigh", most_csi_error=0.1)
    whole = source.batch(3, 0, 1, CPU)
    parts = [source.batch(3, rank, 2, CPU) for rank in (0, 1)]
    for name in ("pictures", "snr_db", "alpha", "kept", "noise", "known", "error"):
        joined = torch.stack([getattr(part, name) for part in parts], dim=1).flatten(0, 1)
        assert torch.equal(joined, getattr(whole, name)), name
    assert parts[0].csi_error == parts[1].csi_error == whole.csi_error > 0
    assert not torch.equal(source.batch(4, 0, 1, CPU).noise, whole.noise)


def test_batches_hold_what_was_asked_for(pixels):
    draws = Draws(batch=400, lowest_snr_db=3, highest_snr_db=6, kept=(2, 5), same_picture=0.5, same_class=0.5, seed=9)
    batch = BatchSource(pixels, LABELS, draws, TOKENS, 16).batch(0, 0, 1, CPU)
    assert 3 <= batch.snr_db.min() < batch.snr_db.max() <= 6
    assert set(batch.kept.tolist()) == {2, 5}
    assert torch.all((batch.alpha >= 0) & (batch.alpha <= 1))
    for end in (0, 1):
        assert 0.05 < (batch.alpha == end).float().mean() < 0.15
    same = (batch.pictures[:, 0] == batch.pictures[:, 1]).flatten(1).all(dim=1).float().mean()
    assert 0.45 < same < 0.65  # that was asked for, and by chance of one class


def test_pixels_survive_the_way_to_a_tensor_and_back(pixels):
    grid = np.random.default_rng(1).integers(0, 256, (2, 8, 8, 3)).astype(np.uint8)
    assert np.array_equal(as_pixels(as_pictures(grid)), grid)
    mirrored = as_pixels(as_pictures(grid, np.array([True, False])))
    assert np.array_equal(mirrored, [grid[0, :, ::-1], grid[1]])


def test_a_folder_has_what_its_manifest_says_and_the_model_comes_back(pixels, tmp_path):
    folder = tmp_path / "run"
    write_settings(folder, MODEL_SETTINGS, Training(steps=2), Draws())
    trainer = trained(pixels, folder / "state.safetensors", Training(steps=2, save_every=1))
    write_results(folder, trainer.averaged, trainer.curve, {"seed": 0})
    manifest = json.loads((folder / MANIFEST).read_text())
    assert set(manifest["files"]) == {"settings.json", "curve.csv", "curves.png", MODEL}
    again = load_model(folder / MODEL)
    pairs, radio = np.stack([np.arange(5), np.arange(5, 10)], axis=1), Radio(snr_db=(10.0, 5.0), seed=1)
    one, other = (alpha_sweep(c, pixels, pairs, (0, 0.5, 1), radio, 8).psnr_db for c in (trainer.averaged, again))
    assert one.shape == (3, 5, 2)
    assert np.array_equal(one, other)
    save_model(again, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == (folder / MODEL).read_bytes()


def test_folders_and_models_that_are_something_else(tmp_path):
    (tmp_path / "letter").write_text("dear")
    with pytest.raises(ConfigError, match="other files"):
        write_settings(tmp_path, MODEL_SETTINGS, Training(), Draws())
    with pytest.raises(BundleError, match="not a broadcast model"):
        load_model(tmp_path / "letter")


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Training(loss="best"), "loss"),
        (lambda: Training(learning_rate=float("nan")), "learning_rate"),
        (lambda: Training(steps=0), "steps"),
        (lambda: Draws(kept=()), "kept"),
        (lambda: Draws(lowest_snr_db=9, highest_snr_db=3), "SNRs"),
        (lambda: Draws(fading="rain"), "fading"),
        (lambda: Draws(same_class=0.8, same_picture=0.4), "fractions"),
        (lambda: BatchSource(np.zeros((0, 4, 4, 3)), [], Draws(), 4, 4), "pictures"),
    ],
)
def test_settings_that_make_no_sense_are_named(make, named):
    with pytest.raises(ConfigError, match=named):
        make()
