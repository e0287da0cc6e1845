"""Clients that ask all the time, and what they were told, all of it judged."""

from __future__ import annotations

import random
import threading
import time
from dataclasses import asdict, dataclass

from tools.bench.catalogue.checker import Expected, judge
from tools.bench.catalogue.cluster import WHOLE_TOKENS, Cluster

LENGTHS = (8, WHOLE_TOKENS, 60)
LEAVES = 0.1  # share of answers that the client does not wait for
HANGS_S = 120.0


@dataclass(slots=True)
class Tally:
    """Of all answers so far."""

    asked: int = 0
    exact: int = 0
    admitted: int = 0  # degraded or suspect, and said so
    refused: int = 0  # an error in words
    broken: int = 0  # ended without a word
    left: int = 0  # by the client
    hung: int = 0
    wrong: int = 0  # called right
    longest_s: float = 0.0

    def words(self) -> str:
        """In one line."""
        return ", ".join(f"{name} {value:.4g}" for name, value in asdict(self).items())


class Visitors:
    """Threads that ask until told to stop."""

    def __init__(self, cluster: Cluster, seed: int, count: int) -> None:
        self.tally = Tally()
        self.complaints: list[str] = []
        self._cluster, self._lock, self._stop = cluster, threading.Lock(), threading.Event()
        self._threads = [
            threading.Thread(target=self._visit, args=(random.Random(f"{seed}/{n}"),), daemon=True, name="visitor")
            for n in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Let the answers in work end."""
        self._stop.set()
        for thread in self._threads:
            thread.join(HANGS_S + 10)

    def _visit(self, rng: random.Random) -> None:
        while not self._stop.is_set():
            self._ask(rng)
            time.sleep(rng.uniform(0.0, 0.1))

    def _ask(self, rng: random.Random) -> None:
        question, streamed = rng.choice(self._cluster.model.questions), rng.random() < 0.7
        tokens = rng.choice(LENGTHS) if streamed else WHOLE_TOKENS
        client = self._cluster.ask(question, tokens, streamed=streamed)
        if leaves := streamed and rng.random() < LEAVES:
            client.until(lambda answer: len(answer.ids) >= tokens // 3, HANGS_S)
            client.leave()
        client.join(HANGS_S)
        answer = client.answer
        never = Expected(completes=False, stall_s=float("inf"))
        verdict = judge(answer, self._cluster.truth(question, tokens), never, answer.asked_s)
        with self._lock:
            tally = self.tally
            tally.asked += 1
            tally.longest_s = max(tally.longest_s, verdict.pause_s)
            tally.wrong += verdict.wrong
            tally.hung += client.is_alive()
            if leaves:
                tally.left += 1
            elif verdict.exact:
                tally.exact += 1
            elif answer.complete:
                tally.admitted += not verdict.wrong
            elif answer.error and answer.told:
                tally.refused += 1
            else:
                tally.broken += 1
            if verdict.wrong or (client.is_alive() and not leaves):
                self.complaints.append(f"{time.strftime('%H:%M:%S')} {'; '.join(verdict.violations) or 'hung'}")
        if answer.error and not leaves:
            time.sleep(0.2)
