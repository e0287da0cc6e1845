"""A bundle's station as graphs: answers requests and scores text, with the experts asked for between the graphs."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from wdmoe.arrays import Float32Array, Int32Array
from wdmoe.backbone.format.bundle import Bundle, Manifest
from wdmoe.backbone.format.station_config import left_out
from wdmoe.backbone.graphs.cache import Row, Rows
from wdmoe.backbone.graphs.passes import Passes, RunLayer, Turns
from wdmoe.backbone.graphs.prefixes import Prefixes
from wdmoe.backbone.graphs.running import GraphModel
from wdmoe.backbone.graphs.tensors import StationTensors
from wdmoe.backbone.graphs.writing.plan import station_plan
from wdmoe.backbone.runtime.choosing import Chooser
from wdmoe.backbone.runtime.job import Job, Telling, end_tokens
from wdmoe.backbone.text.tokenizer import TextTokenizer, load_tokenizer
from wdmoe.errors import BundleError, CancelledRequestError, UnsupportedModelError
from wdmoe.heap import return_memory
from wdmoe.layer_call import Caller
from wdmoe.receipt import Ledger
from wdmoe.records import Finished

BITS = {"fp32": 32, "int8": 8, "int4": 4}


class GraphStation:
    """Implements `Backbone` of `wdmoe.backbone.runtime.engine`. Its methods run in the greenlet of a request."""

    kind = "graphs"

    def __init__(
        self,
        model: GraphModel,
        tokenizer: TextTokenizer,
        manifest: Manifest,
        eos: tuple[int, ...],
        run: RunLayer,
        turns: Turns,
        *,
        prefill_chunk: int,
        prefix_bytes: int,
        alternates: bool,
    ) -> None:
        """What others say of the arguments: `load_graph_station`."""
        self.model = model
        self.tokenizer = tokenizer
        self.manifest = manifest
        self.eos = eos
        self.prefixes = Prefixes(prefix_bytes)
        self._rows = Rows(model.plan, model.forget)
        self._passes = Passes(model, run, turns, prefill_chunk, alternates)

    def at_work(self) -> AbstractContextManager[object]:
        """See `Backbone`. ONNX Runtime brings its threads, and knows no gradients."""
        return nullcontext()

    def begin(self, ledger: Ledger) -> None:
        """See `Backbone`. Nothing to do: each call here says what it is booked on."""

    def forget(self) -> None:
        """See `Backbone`."""
        self.prefixes.forget()

    def size_bytes(self, tokens: int) -> int:
        """See `Backbone`."""
        return self._rows.size_bytes(tokens)

    def answer(self, job: Job) -> Finished:
        """Run a job to its end.

        Raises:
            CancelledRequestError: `job.cancel` was called; noticed between two passes, or while it waits.
            ExpertsUnavailableError: from a layer that has no expert left.
            NotFiniteError: the model's scores are no numbers.
        """
        telling = Telling(job, self.tokenizer, self.eos)
        row = self._rows.enter(len(job.prompt_ids) + job.sampling.max_tokens)
        try:
            seen = self._answer(job, telling, row)
            kept = row.copy() if self.prefixes.wants(row) else None
        finally:
            self._rows.leave(row)
        finished = telling.finish()
        if kept is not None and not (
            finished.receipt.degraded or finished.receipt.suspect
        ):  # what was wrong would stay
            self.prefixes.keep(seen, kept)
        return finished

    def _answer(self, job: Job, telling: Telling, row: Row) -> Int32Array:
        """Make and tell all tokens that are left. Returns those that the row has seen."""
        chooser, caller = Chooser(job.sampling), Caller(job.ledger, job)
        known = [*job.prompt_ids, *job.begun]
        job.ledger.reused_tokens = self.prefixes.begin(np.array(known, np.int32), row)
        while not telling.over:
            scores = self._passes.step(np.array(known[row.seen :], np.int32), row, caller)
            if job.cancelled:
                raise CancelledRequestError("the client went away")
            token = chooser.choose(scores[0], job.ledger.completion_tokens)
            telling.tell(token)
            known.append(token)
        return np.array(known[: row.seen], np.int32)

    def nats(self, windows: Int32Array, ledger: Ledger) -> Float32Array:
        """(windows, length) token ids -> (windows, length - 1) negative log-likelihood of every token but the first."""
        return np.stack([self._nats(window.astype(np.int32), ledger) for window in windows])

    def _nats(self, window: Int32Array, ledger: Ledger) -> Float32Array:
        row = self._rows.enter(len(window))
        try:
            scores = self._passes.step(window, row, Caller(ledger), every=True)[:-1]
        finally:
            self._rows.leave(row)
        largest = scores.max(axis=1, keepdims=True)
        total = np.log(np.exp(scores - largest).sum(axis=1)) + largest[:, 0]
        nats: Float32Array = total - scores[np.arange(len(scores)), window[1:]]
        return nats


def load_graph_station(
    bundle: Bundle,
    run: RunLayer,
    turns: Turns,
    *,
    prefill_chunk: int,
    precision: str = "fp32",
    threads: int = 0,
    prefix_bytes: int = 0,
    alternates: bool = True,
) -> GraphStation:
    """Make the graphs of a bundle's station.

    Args:
        bundle: an opened bundle.
        run: computes the experts of a layer.
        turns: of the requests' greenlets.
        prefill_chunk: most tokens of prompts in a pass.
        precision: of the large matrices, a key of `BITS`.
        threads: of a step; 0: half of the cores, a few at most.
        prefix_bytes: for what is kept of former requests; 0: nothing is.
        alternates: whether two groups of requests may take turns with the devices.
    Raises:
        UnsupportedModelError: there are no graphs for this model.
        BundleError: the station's files do not make up the model.
    """
    config = _json(bundle, "config.json")
    if unsaid := left_out(config):  # of an earlier wdmoe: what the family takes then is transformers' to know
        raise UnsupportedModelError(f"its config.json does not say {unsaid[0]}, which an export of today writes down")
    tensors = StationTensors(bundle.station_weights())
    try:
        plan = station_plan(config, tensors, bundle.manifest.moe_layers)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        reason = f"{bundle.root}: config.json cannot be what an export wrote: {type(error).__name__}: {error}"
        raise BundleError(reason) from error
    positions = bundle.manifest.context_tokens
    try:
        model = GraphModel(plan, tensors, bits=BITS[precision], threads=threads, positions=positions)
    except KeyError as error:
        raise BundleError(f"{bundle.root}: the station lacks {error}; export it again") from error
    return_memory()  # what the graphs were made of
    generation = _json(bundle, "generation_config.json", optional=True)
    ends = end_tokens(generation.get("eos_token_id", config.get("eos_token_id")))
    return GraphStation(
        model,
        load_tokenizer(bundle.station_folder),
        bundle.manifest,
        ends,
        run,
        turns,
        prefill_chunk=prefill_chunk,
        prefix_bytes=prefix_bytes,
        alternates=alternates,
    )


def _json(bundle: Bundle, name: str, *, optional: bool = False) -> dict[str, Any]:
    try:
        content = json.loads((bundle.station_folder / name).read_bytes())
    except FileNotFoundError as error:
        if optional:
            return {}
        raise BundleError(f"{bundle.root}: the station has no {name}") from error
    except (OSError, ValueError) as error:
        raise BundleError(f"{bundle.root}: {name} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise BundleError(f"{bundle.root}: {name} is no JSON object")
    return content
