"""Settings of a comparison, measured by several processes; each finished one is a part in the results folder."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace

import torch

from wdmoe.broadcast.study.results import Parts
from wdmoe.broadcast.study.study import Fronts, Progress, Setting, Study

_here: list[tuple[Study, Parts]] = []  # in a worker: what it works with


def measure_all(
    study: Study, parts: Parts, settings: Sequence[Setting], jobs: int, progress: Progress
) -> dict[str, Fronts]:
    """Qualities of every system in every setting, by the setting's name.

    Args:
        study: what measures; with several jobs each gets a copy. Classical ladders should be there already.
        parts: where finished settings are kept, and come from.
        settings: in the order of the result.
        jobs: processes, each with one thread; 1 measures in this one.
        progress: told which setting is next or done, and how far.
    """
    if jobs > 1:
        _measure_elsewhere(study, parts, [each for each in settings if not parts.holds(each.name)], jobs, progress)
    found: dict[str, Fronts] = {}
    for place, setting in enumerate(settings):
        if jobs <= 1:
            progress(setting.name, place / len(settings))
        found |= _measured(study, parts, setting)
    return found


def _measure_elsewhere(study: Study, parts: Parts, settings: list[Setting], jobs: int, progress: Progress) -> None:
    context = multiprocessing.get_context("spawn")  # PyTorch's threads do not survive a fork
    with ProcessPoolExecutor(jobs, context, _begin, (replace(study, progress=None), parts)) as pool:
        by_cost = sorted(settings, key=lambda each: -each.pictures * each.points)
        waiting = {pool.submit(_work, setting): setting for setting in by_cost}
        try:
            for done, future in enumerate(as_completed(waiting), 1):
                future.result()
                progress(waiting[future].name, done / len(waiting))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _begin(study: Study, parts: Parts) -> None:
    torch.set_num_threads(1)
    _here.append((study, parts))


def _work(setting: Setting) -> None:
    _measured(*_here[0], setting)


def _measured(study: Study, parts: Parts, setting: Setting) -> dict[str, Fronts]:
    return parts.measured(setting.name, lambda: {setting.name: study.run(setting)})
