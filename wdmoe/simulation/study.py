"""All draws of a scenario, on one core or on many machines: the same figures to the last digit."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from typing import Any

import joblib
import numpy as np
import numpy.typing as npt
from joblib.externals.loky import get_reusable_executor

from wdmoe.errors import ConfigError, MissingExtraError
from wdmoe.results.gate_trace import GateTrace
from wdmoe.simulation.channel_draw import make_draw
from wdmoe.simulation.placement import Holders, holders_of
from wdmoe.simulation.replay import OUTCOMES, Replay, outcome
from wdmoe.simulation.scenario import Scenario
from wdmoe.simulation.scenario_file import find_trace

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, eq=False)
class Study:
    """What came out: `values` (draws, variants, outcomes), in the order of the scenario and of `OUTCOMES`."""

    scenario: Scenario
    values: npt.NDArray[np.float64]

    def of(self, name: str) -> npt.NDArray[np.float64]:
        """(draws, variants) of one outcome."""
        column: npt.NDArray[np.float64] = self.values[:, :, OUTCOMES.index(name)]
        return column


def run_study(scenario: Scenario, workers: int = -1, progress: Progress | None = None) -> Study:
    """Compute all draws.

    Args:
        workers: processes; -1: one for each core. A cluster's own where the scenario's backend is one.
        progress: called with draws done and draws in all.
    Raises:
        ConfigError: the trace does not fit, or the backend cannot be had.
        MissingExtraError: the backend's package is not installed.
    """
    trace = GateTrace.load(find_trace(scenario.model.trace))
    replay = Replay.of(trace)
    _check_fit(scenario, trace)
    rows: list[Any] = []
    with _backend(scenario.backend):
        # Ray's back-end hands all rows out at the end only.
        parallel = joblib.Parallel(n_jobs=workers, return_as="list" if _is_ray(scenario) else "generator")
        task = joblib.delayed(one_draw)
        # In order of their number, whoever finishes first.
        for row in parallel(task(scenario, replay, number) for number in range(scenario.draws)):
            rows.append(row)
            if progress is not None:
                progress(len(rows), scenario.draws)
    return Study(scenario, np.array(rows, np.float64))


def one_draw(scenario: Scenario, replay: Replay, number: int) -> list[tuple[float, ...]]:
    """All variants on draw `number`: values in the order of `OUTCOMES`."""
    layers, tokens = replay.experts.shape[:2]
    draw = make_draw(scenario, number, layers, tokens)
    placed: dict[object, Holders] = {}
    rows = []
    for variant in scenario.variants:
        key = (variant.placement, variant.replicas, variant.policy.levers.bits)
        if key not in placed:
            placed[key] = holders_of(variant, scenario.devices, draw.mean, replay.frequency)
        rows.append(astuple(outcome(scenario, variant, draw, replay, placed[key])))
    return rows


def _check_fit(scenario: Scenario, trace: GateTrace) -> None:
    if scenario.model.tokens > trace.tokens:
        raise ConfigError(f"[model] tokens: {scenario.model.tokens} of a trace that has {trace.tokens}")
    replacing = [variant.name for variant in scenario.variants if variant.policy.least_similarity <= 1]
    if replacing and trace.expert_similarity is None:
        raise ConfigError(
            f"[[variant]] {replacing[0]!r} replaces similar experts, but the trace has no expert similarity: "
            "record it with wdmoe-node trace --expert-similarity"
        )


@contextlib.contextmanager
def _backend(text: str) -> Iterator[None]:
    """joblib's back-end for the block: processes of this machine, or a cluster's."""
    name, _, address = text.partition(":")
    with contextlib.ExitStack() as stack:
        try:
            if name == "dask":
                from distributed import Client

                stack.enter_context(Client(address or None, set_as_default=True))
            elif name == "ray":
                _start_ray(address, stack)
        except ModuleNotFoundError as error:
            raise MissingExtraError(f"backend {text} needs {name}: pip install {_PACKAGES[name]}") from error
        except (OSError, ValueError, ConnectionError) as error:
            raise ConfigError(f"backend {text} cannot be reached: {error}") from error
        if name == "loky":
            stack.callback(_end_processes)
        stack.enter_context(joblib.parallel_config(backend=name))
        yield


def _is_ray(scenario: Scenario) -> bool:
    return scenario.backend.partition(":")[0] == "ray"


def _start_ray(address: str, stack: contextlib.ExitStack) -> None:
    """A cluster's, or one of this machine that ends with the stack; one that runs in this process already stays."""
    import ray
    from ray.util.joblib import register_ray

    if not ray.is_initialized():
        try:
            ray.init(address=address or None)
        except Exception as error:  # what ray raises where a node does not start has no class of its own
            raise ConnectionError(" ".join(str(error).split())) from error
        stack.callback(ray.shutdown)
    register_ray()


def _end_processes() -> None:
    """joblib keeps its processes for a next time that does not come."""
    get_reusable_executor().shutdown(wait=True, kill_workers=True)


_PACKAGES = {"dask": "'dask[distributed]'", "ray": "ray"}
