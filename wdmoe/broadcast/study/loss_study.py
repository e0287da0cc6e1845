"""Training losses side by side: the codec trained once with each of them, all else the same, and what each reaches."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from wdmoe.broadcast.codec.model import BroadcastCodec
from wdmoe.broadcast.codec.model_file import load_model, save_model
from wdmoe.broadcast.datasets.pictures import PICTURES_SHA256, SPLIT_SHA256
from wdmoe.broadcast.quality.alpha_sweep import alpha_sweep
from wdmoe.broadcast.quality.pareto_front import Front
from wdmoe.broadcast.study.loss_plan import KINDS, START, LossPlan, Pool, loss_settings
from wdmoe.broadcast.study.results import Parts
from wdmoe.broadcast.study.study import Fronts, Progress, Setting
from wdmoe.broadcast.training.batches import BatchSource
from wdmoe.broadcast.training.initialisation import untrained
from wdmoe.broadcast.training.learning_curve import Curve
from wdmoe.broadcast.training.losses import LOSSES
from wdmoe.broadcast.training.run_folder import MODEL, STATE, read_curve, write_results, write_settings
from wdmoe.broadcast.training.training import Row, Team, Trainer, fingerprint_of
from wdmoe.errors import ConfigError
from wdmoe.results.folder import MANIFEST, check_files, read_manifest, sha256_of


@dataclass(slots=True)
class LossStudy:
    """Trains and measures below a folder; a run that was interrupted goes on."""

    folder: Path
    plan: LossPlan
    pool: Pool
    device: torch.device
    progress: Progress
    begin: BroadcastCodec | None = None  # none: untrained
    _curve: Curve = field(init=False)

    def __post_init__(self) -> None:
        """ConfigError if the plan asks for pairs that there are not."""
        self._curve = Curve(self.pool.pixels, self.pool.labels, self.pool.choose, self.plan.curve_pairs)
        for kind in KINDS:
            self.pool.pairs(kind, self.plan.pictures)

    def train(self) -> dict[str, Path]:
        """The models of all systems, by name: one for each loss, and what all of them began with."""
        start = self._beginning()
        return {**{loss: self._trained(loss, start) for loss in LOSSES}, START: start}

    def parts(self, models: Mapping[str, Path]) -> Parts:
        """What an interrupted `measure` of these models left in the folder."""
        return Parts(self.folder, (self.plan.pictures, self.plan.points), models)

    def measure(self, models: Mapping[str, Path], parts: Parts) -> dict[str, Fronts]:
        """Fronts of all systems by name of the setting."""
        settings = loss_settings(self.plan.pictures, self.plan.points)
        found: dict[str, Fronts] = {each.name: {} for each in settings}
        for number, (name, file) in enumerate(models.items()):
            codec = load_model(file).to(self.device)
            for place, setting in enumerate(settings):
                what = f"{name}, {setting.name}"
                self.progress(what, (number + place / len(settings)) / len(models))
                part = parts.measured(what, partial(_named, codec, self.pool, setting, name))
                found[setting.name] |= part[setting.name]
        return found

    def curves(self, models: Mapping[str, Path]) -> dict[str, list[Row]]:
        """Learning curves of the losses as `curve.csv` has them, and as a single row at step 0 what all began with."""
        start = self._curve.measure(load_model(models[START]).to(self.device))
        rows = {name: read_curve(file.parent) for name, file in models.items() if name != START}
        return {**rows, START: [{"step": 0.0, **start}]}

    def _beginning(self) -> Path:
        """The model file that every loss begins with; ConfigError if another run's lies there."""
        folder = self.folder / START
        mark = json.dumps([asdict(self.plan.model), self.plan.draws.seed, self.plan.begin, SPLIT_SHA256])
        note, file = folder / "settings.json", folder / MODEL
        if note.is_file():  # written last
            if note.read_text(encoding="utf-8") != mark:
                raise ConfigError(f"{self.folder} is of a run with other settings or pictures; name another folder")
            return file
        self.progress("principal components", 0.0)
        folder.mkdir(exist_ok=True)
        train = self.pool.pixels[self.pool.train]
        save_model(self.begin or untrained(self.plan.model, train, self.plan.draws.seed), file)
        note.write_text(mark, encoding="utf-8")
        return file

    def _trained(self, loss: str, start: Path) -> Path:
        """The model file of one loss, trained as far as it was not yet."""
        plan, folder = self.plan, self.folder / loss
        training = replace(plan.training, loss=loss)
        mark = fingerprint_of(training, plan.draws, SPLIT_SHA256, sha256_of(start))
        trainer = Trainer(load_model(start).to(self.device), self._source(), training, Team())
        trainer.restore(folder / STATE, mark)
        if trainer.step == training.steps and (folder / MANIFEST).exists():
            check_files(folder, read_manifest(folder), (MODEL,))
            return folder / MODEL
        write_settings(folder, plan.model, training, plan.draws)
        begun, clock, used = trainer.step, time.perf_counter(), time.process_time()
        trainer.run(
            folder / STATE, mark, self._curve.measure, lambda what, done: self.progress(f"{loss}, {what}", done)
        )
        took = {"seconds": time.perf_counter() - clock, "processor_seconds": time.process_time() - used}
        facts = {"took": {"steps": trainer.step - begun, **took}, "seed": plan.draws.seed}
        data = {"pictures_sha256": PICTURES_SHA256, "split_sha256": SPLIT_SHA256}
        write_results(folder, trainer.averaged, trainer.curve, {**facts, **data})
        return folder / MODEL

    def _source(self) -> BatchSource:
        numbers, model = self.pool.train, self.plan.model
        pixels, labels = self.pool.pixels[numbers], self.pool.labels[numbers]
        return BatchSource(pixels, labels, self.plan.draws, model.tokens, model.slots)


def run_setting(codec: BroadcastCodec, pool: Pool, setting: Setting, first_pairs: int | None = None) -> Front:
    """Qualities of a codec; every codec meets the same pairs and noise. `first_pairs`: only so many of them."""
    pairs = pool.pairs(setting.kind, setting.pictures)[:first_pairs]
    shares, kept = np.linspace(0, 1, setting.points), codec.settings.kept(setting.cbr)
    return alpha_sweep(codec, pool.pixels, pairs, shares, setting.radio, kept)


def _named(codec: BroadcastCodec, pool: Pool, setting: Setting, system: str) -> dict[str, Fronts]:
    return {setting.name: {system: run_setting(codec, pool, setting)}}
