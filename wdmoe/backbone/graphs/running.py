"""Runs tokens of one request or of many through a model, with the experts asked for between the graphs. No torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from wdmoe.arrays import Float32Array, Int32Array
from wdmoe.backbone.graphs.buffers import Buffers, Span
from wdmoe.backbone.graphs.cache import Slab
from wdmoe.backbone.graphs.plan import StationPlan
from wdmoe.backbone.graphs.sessions import StationSessions
from wdmoe.backbone.graphs.writing import Weights
from wdmoe.layer_call import Demand

KEPT = 8  # buffers, of different sizes
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
            threads: of a step; 0: one for each core, a few at most.
            positions: longest prompt plus answer.
        """
        self.plan = plan
        self._sessions = StationSessions(plan, weights, bits, threads, positions)
        self._buffers: list[Buffers] = []  # that no pass uses now, the most recently used last
        self._in_use: list[Buffers] = []

    def forget(self, slab: Slab) -> None:
        """A slab is gone: keep nothing of it."""
        for each in (*self._buffers, *self._in_use):  # a pass of others may be under way
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
        buffers = self._take(len(tokens))
        try:
            self._through(buffers, tokens, spans, experts)
            scores = self._scores(buffers, scored)
        finally:
            self._give_back(buffers)
        for span in spans:
            for row in span.rows:
                row.seen += span.tokens
        return scores

    def _through(self, buffers: Buffers, tokens: Int32Array, spans: Sequence[Span], experts: RunExperts) -> None:
        """All layers: `buffers` holds what comes out of the last one."""
        buffers.begin(tokens)
        attentions = [buffers.attention(span, place) for span, place in _placed(spans)]
        for index, layer in enumerate(self.plan.layers):
            buffers.before(index)
            for attention in attentions:
                attention.run(index)
            buffers.after(index)
            if layer.router is not None:
                shared = buffers.shared(index)
                ahead = None if shared is None else shared.compute
                buffers.take(experts(layer.number, buffers.hidden(), buffers.demand(index), ahead), shared)

    def _scores(self, buffers: Buffers, scored: Int32Array | None) -> Float32Array:
        wanted = slice(None) if scored is None else scored
        given = {"x": buffers.last[wanted]}
        if not len(given["x"]):
            return given["x"]
        if self.plan.has_experts_below(len(self.plan.layers)):
            given["moe"] = buffers.moe[wanted]
        scores: Float32Array = self._sessions.head.run(None, given)[0]
        return scores

    def _take(self, tokens: int) -> Buffers:
        found = next((each for each in self._buffers if each.tokens == tokens), None)
        if found is None:
            found = Buffers(self._sessions, tokens)
        else:
            self._buffers.remove(found)
        self._in_use.append(found)
        return found

    def _give_back(self, buffers: Buffers) -> None:
        self._in_use.remove(buffers)
        if buffers.tokens <= KEPT_TOKENS:
            self._buffers = [*self._buffers, buffers][-KEPT:]


def _placed(spans: Sequence[Span]) -> Sequence[tuple[Span, int]]:
    """Each span with the place of its first token."""
    placed, place = [], 0
    for span in spans:
        placed.append((span, place))
        place += span.size
    return placed
