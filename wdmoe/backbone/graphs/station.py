"""A bundle's station as graphs: answers requests and scores text, with the experts asked for between the graphs."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np

from wdmoe.arrays import Float32Array, Int32Array
from wdmoe.backbone.format.bundle import Bundle, Manifest
from wdmoe.backbone.graphs.choosing import Chooser
from wdmoe.backbone.graphs.plan import station_plan
from wdmoe.backbone.graphs.prefixes import Prefixes
from wdmoe.backbone.graphs.running import GraphModel, RunExperts
from wdmoe.backbone.graphs.tensors import StationTensors
from wdmoe.backbone.runtime.job import Job, Telling
from wdmoe.errors import BundleError, CancelledRequestError
from wdmoe.heap import return_memory
from wdmoe.layer_call import Client, Demand, LayerCall
from wdmoe.receipt import Ledger
from wdmoe.records import Finished

RunLayer = Callable[[LayerCall], Float32Array]
BITS = {"fp32": 32, "int8": 8, "int4": 4}


class GraphStation:
    """Implements `Backbone` of `wdmoe.backbone.runtime.engine`. Its methods run in the greenlet of a request."""

    kind = "graphs"

    def __init__(
        self,
        model: GraphModel,
        tokenizer: Any,
        manifest: Manifest,
        eos: tuple[int, ...],
        run: RunLayer,
        prefix_bytes: int = 0,
    ) -> None:
        """`run`: computes the experts of a layer. `prefix_bytes`: for what is kept of former requests."""
        self.model = model
        self.tokenizer = tokenizer
        self.manifest = manifest
        self.eos = eos
        self._run = run
        self.prefixes = Prefixes(prefix_bytes)

    def begin(self, ledger: Ledger) -> None:
        """See `Backbone`. Nothing to do: each call here says what it is booked on."""

    def forget(self) -> None:
        """See `Backbone`."""
        self.prefixes.forget()

    def answer(self, job: Job, prefill_chunk: int) -> Finished:
        """Run a job to its end.

        Raises:
            CancelledRequestError: `job.cancel` was called; noticed at the next layer, or while it waits.
            ExpertsUnavailableError: from a layer that has no expert left.
            NotFiniteError: the model's scores are no numbers.
        """
        telling, chooser = Telling(job, self.tokenizer, self.eos), Chooser(job.sampling)
        cache = self.model.new_cache(len(job.prompt_ids) + job.sampling.max_tokens)
        experts = self._experts(job.ledger, job)
        ids = seen = np.array(job.prompt_ids + job.begun, np.int32)
        job.ledger.reused_tokens = self.prefixes.begin(ids, cache)
        ids = ids[cache.seen :]
        while not telling.over:
            while len(ids) > prefill_chunk:  # a long prompt must not hold up other requests
                self.model.step(ids[:prefill_chunk], cache, experts, scored="none")
                ids = ids[prefill_chunk:]
            scores = self.model.step(ids, cache, experts)
            if job.cancelled:
                raise CancelledRequestError("the client went away")
            token = chooser.choose(scores[0], job.ledger.completion_tokens)
            telling.tell(token)
            ids = np.array([token], np.int32)
            seen = np.append(seen, ids)
        finished = telling.finish()
        if not (finished.receipt.degraded or finished.receipt.suspect):  # else what was wrong would stay so
            self.prefixes.keep(seen, cache)
        return finished

    def nats(self, windows: Int32Array, ledger: Ledger) -> Float32Array:
        """(windows, length) token ids -> (windows, length - 1) negative log-likelihood of every token but the first."""
        return np.stack([self._nats(window, ledger) for window in windows])

    def _nats(self, window: Int32Array, ledger: Ledger) -> Float32Array:
        cache = self.model.new_cache(len(window))
        scores = self.model.step(window.astype(np.int32), cache, self._experts(ledger, None), scored="all")[:-1]
        largest = scores.max(axis=1, keepdims=True)
        total = np.log(np.exp(scores - largest).sum(axis=1)) + largest[:, 0]
        nats: Float32Array = total - scores[np.arange(len(scores)), window[1:]]
        return nats

    def _experts(self, ledger: Ledger, client: Client | None) -> RunExperts:
        first = self.manifest.moe_layers[0]

        def experts(
            layer: int, tokens: Float32Array, demand: Demand, meanwhile: Callable[[], object] | None
        ) -> Float32Array:
            if ledger.cancelled:  # here too: the layers of a pass may each wait for a deadline
                raise CancelledRequestError("the client went away")
            if layer == first:
                ledger.open_pass()
            call = LayerCall(
                layer=layer, tokens=tokens, demand=demand, ledger=ledger, meanwhile=meanwhile, client=client
            )
            return self._run(call)

        return experts


def load_graph_station(
    bundle: Bundle, run: RunLayer, *, precision: str = "fp32", threads: int = 0, prefix_bytes: int = 0
) -> GraphStation:
    """Make the graphs of a bundle's station.

    Args:
        bundle: an opened bundle.
        run: computes the experts of a layer.
        precision: of the large matrices, a key of `BITS`.
        threads: of a step; 0: one for each core, a few at most.
        prefix_bytes: for what is kept of former requests; 0: nothing is.
    Raises:
        UnsupportedModelError: there are no graphs for this model.
        BundleError: the station's files do not make up the model.
    """
    config = _json(bundle, "config.json")
    tensors = StationTensors(bundle.station_weights())
    plan = station_plan(config, tensors.names, bundle.manifest.moe_layers)
    try:
        model = GraphModel(
            plan, tensors.get, bits=BITS[precision], threads=threads, positions=bundle.manifest.context_tokens
        )
    except KeyError as error:
        raise BundleError(f"{bundle.root}: the station lacks {error}; export it again") from error
    return_memory()  # what the graphs were made of
    generation = _json(bundle, "generation_config.json", optional=True)
    eos = generation.get("eos_token_id", config.get("eos_token_id"))
    ends = () if eos is None else tuple(eos) if isinstance(eos, list) else (int(eos),)
    return GraphStation(model, _tokenizer(bundle), bundle.manifest, ends, run, prefix_bytes)


def _json(bundle: Bundle, name: str, *, optional: bool = False) -> dict[str, Any]:
    path = bundle.station_folder / name
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        if optional:
            return {}
        raise BundleError(f"{bundle.root}: the station has no {name}") from error
    except (OSError, ValueError) as error:
        raise BundleError(f"{bundle.root}: {name} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise BundleError(f"{bundle.root}: {name} is no JSON object")
    return content


def _tokenizer(bundle: Bundle) -> Any:
    from wdmoe.backbone.runtime.station import load_tokenizer

    return load_tokenizer(bundle)
