"""Runs tokens of one request or of many through a model, with the experts asked for between the graphs. No torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from wdmoe.arrays import Float32Array, Int32Array
from wdmoe.backbone.graphs.buffers import Buffers
from wdmoe.backbone.graphs.cache import Slab
from wdmoe.backbone.graphs.sessions import StationSessions
from wdmoe.backbone.graphs.ways import Span, Way, Ways
from wdmoe.backbone.graphs.writing.graph import Weights
from wdmoe.backbone.graphs.writing.plan import StationPlan
from wdmoe.layer_call import Demand

KEPT = 8  # ways with their buffers, of different sizes
KEPT_TOKENS = 64  # larger ones are not

# layer, (tokens, hidden) and what the gate asks, and what to compute meanwhile -> (tokens, hidden)
RunExperts = Callable[[int, Float32Array, Demand, "Callable[[], object] | None"], Float32Array]


class GraphModel:
    """The station of a model, as graphs. One thread uses it."""

    def __init__(
        self, plan: StationPlan, weights: Weights, *, bits: int = 32, threads: int = 0, positions: int
    ) -> None:
        """Make all sessions.

        Args:
            plan: of the model.
            weights: its tensors.
            bits: of the large matrices: 32, 8 or 4.
            threads: of a step; 0: half of the cores, a few at most.
            positions: longest prompt plus answer.
        """
        self.plan = plan
        self._sessions = StationSessions(plan, weights, bits, threads, positions)
        self._ways: list[Ways] = []  # that no pass uses now, the most recently used last
        self._in_use: list[Ways] = []

    @property
    def last_experts(self) -> int:
        """The last layer with experts."""
        return max((layer.number for layer in self.plan.layers if layer.router is not None), default=-1)

    def forget(self, slab: Slab) -> None:
        """A slab is gone: keep nothing of it."""
        for each in (*self._ways, *self._in_use):  # a pass of others may be under way
            each.forget(slab)

    def run(
        self, tokens: Int32Array, spans: Sequence[Span], experts: RunExperts, scored: Int32Array | None = None
    ) -> Float32Array:
        """Run some more tokens of some requests. Their rows count them in once all is computed.

        Args:
            tokens: (n,) ids, span by span and row by row.
            spans: whose they are.
            experts: computes each layer's experts.
            scored: places among the tokens whose scores are wanted; None: all.
        Returns:
            (scored, vocabulary) scores for the token after each of them.
        """
        ways = self._take(len(tokens))
        try:
            way = ways.through(spans)
            self._through(way, ways.buffers, tokens, experts)
            scores = self._scores(way, ways.buffers, scored)
        finally:
            self._give_back(ways)
        for span in spans:
            for row in span.rows:
                row.seen += span.tokens
        return scores

    def _through(self, way: Way, buffers: Buffers, tokens: Int32Array, experts: RunExperts) -> None:
        """All layers: `way.last` holds what comes out of the last one."""
        buffers.begin(tokens)
        for index, layer in enumerate(self.plan.layers):
            way.run(index)
            if layer.router is not None:
                shared = buffers.shared(index)
                ahead = None if shared is None else shared.compute
                buffers.take(experts(layer.number, buffers.hidden(), buffers.demand(index), ahead), shared)

    def _scores(self, way: Way, buffers: Buffers, scored: Int32Array | None) -> Float32Array:
        wanted = slice(None) if scored is None else scored
        given = {"x": way.last[wanted]}
        if not len(given["x"]):
            return given["x"]
        if self.plan.has_experts_below(len(self.plan.layers)):
            given["moe"] = buffers.moe[wanted]
        scores: Float32Array = self._sessions.head.run(None, given)[0]
        return scores

    def _take(self, tokens: int) -> Ways:
        found = next((each for each in self._ways if each.buffers.tokens == tokens), None)
        if found is None:
            found = Ways(self._sessions, tokens)
        else:
            self._ways.remove(found)
        self._in_use.append(found)
        return found

    def _give_back(self, ways: Ways) -> None:
        self._in_use.remove(ways)
        if ways.buffers.tokens <= KEPT_TOKENS:
            self._ways = [*self._ways, ways][-KEPT:]
