"""What a fault is, and one try of it: begin two answers, inject at the right moment, heal, and look at everything."""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tools.bench.catalogue.checker import Expected, Verdict, judge
from tools.bench.catalogue.client import Client
from tools.bench.catalogue.cluster import WHOLE_TOKENS, Cluster, ClusterError
from tools.bench.catalogue.model import Question
from tools.bench.catalogue.records import PHASES, Answer, Bounds, ClusterSpec, TryRecord

CHECK_TOKENS = 16
MOST_WORDS = 300


class Impossible(Exception):
    """Cannot be tried on this machine; says what is missing."""


@dataclass(slots=True)
class Scene:
    """One try: where it happens, its chance, and what it finds."""

    cluster: Cluster
    rng: random.Random
    number: int
    phase: str
    cells: int = 1  # of the fault: tries in a row that meet the same kind
    notes: list[str] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    injected_s: float = 0.0

    @property
    def bounds(self) -> Bounds:
        """Of the cluster."""
        return self.cluster.bounds

    def choose(self, kinds: Sequence[str]) -> str:
        """One kind after the other, so that few tries meet all of them. Noted."""
        kind = kinds[self.number // self.cells % len(kinds)]
        self.notes.append(kind)
        return kind

    def require(self, good: object, complaint: str) -> None:
        """Write down a violation unless it is good."""
        if not good:
            self.violations.append(complaint[:MOST_WORDS])


class Fault:
    """One row of the table. A subclass says how it begins and how it ends."""

    id = ""
    title = ""
    passes = ""  # in words, for the page and `--list`
    tries = 20  # with each number of copies, dealt over the phases
    cost_s = 2.0  # of one try, about
    start_s = 8.0  # of a cluster
    copies: tuple[int, ...] = (2, 1)
    phases: tuple[str, ...] = PHASES
    spec = ClusterSpec()
    tokens = 60
    alone = False  # one client only, so that its time can be compared
    memory_bytes = 0  # that it may leave behind in the base station, beside the usual bound

    @classmethod
    def cells(cls) -> list[tuple[int, str]]:
        """(copies, phase) that tries are dealt over."""
        return [(copies, phase) for copies in cls.copies for phase in cls.phases]

    def spec_for(self, copies: int) -> ClusterSpec:
        """What it needs, with so many copies."""
        return dataclasses.replace(self.spec, copies=copies)

    def inject(self, scene: Scene) -> None:
        """Do it."""
        raise NotImplementedError

    def heal(self, scene: Scene) -> None:
        """Undo it. Called when the answers have ended, whatever happened."""

    def expected(self, scene: Scene) -> Expected:
        """With a copy of each expert nothing shows; without, quality may suffer and is said to."""
        copies = scene.cluster.spec.copies
        bounds = scene.bounds
        return Expected(exact=copies > 1, stall_s=bounds.stall_copy_s if copies > 1 else bounds.stall_s)

    def judge(self, scene: Scene) -> None:
        """Further demands, after the answers and before the healing."""

    def after(self, scene: Scene) -> None:
        """Further demands, after the healing."""

    # ---- one try

    def attempt(self, cluster: Cluster, rng: random.Random, number: int, phase: str) -> TryRecord:
        """Try it once. Raises Impossible, and ClusterError where the cluster is gone for good."""
        scene = Scene(cluster, rng, number, phase, len(self.cells()))
        begun_s = time.monotonic()
        verdicts = self.play(scene)
        healed_s = self.recover(scene)
        leftovers = cluster.leftovers()
        return record(self, scene, verdicts, healed_s, leftovers, time.monotonic() - begun_s)

    def play(self, scene: Scene) -> list[Verdict]:
        """Two clients, one of them streamed, and the fault in the middle of it."""
        cluster = scene.cluster
        questions = [scene.rng.choice(cluster.model.questions) for _ in range(1 if self.alone else 2)]
        clients = [cluster.ask(questions[0], self.tokens)]
        clients += [cluster.ask(each, WHOLE_TOKENS, streamed=False) for each in questions[1:]]
        try:
            reach(scene, clients[0], self.tokens)
            scene.injected_s = time.monotonic()
            self.inject(scene)
            for client in clients:
                client.join(max(0.0, scene.injected_s + cluster.bounds.patience_s - time.monotonic()))
            scene.answers = [client.answer for client in clients]
            cluster.heard(clients[0].answer)
            self.judge(scene)
        finally:
            self.heal(scene)
        return self._verdicts(scene, questions)

    def _verdicts(self, scene: Scene, questions: list[Question]) -> list[Verdict]:
        expected = self.expected(scene)
        verdicts = []
        for answer, question in zip(scene.answers, questions, strict=True):
            verdict = judge(answer, scene.cluster.truth(question, answer.wanted), expected, scene.injected_s)
            verdicts.append(verdict)
            scene.violations += verdict.violations
        return verdicts

    def recover(self, scene: Scene) -> float:
        """Everything is back, and an answer is whole and exact again. Seconds that it took."""
        cluster = scene.cluster
        for node in (each for each in cluster.devices if not each.alive):
            scene.violations.append(f"{node.name} ended by itself: {node.said()[-160:].strip()}")
            node.start()
        settled_s = cluster.settle(scene.bounds.settle_s)
        if settled_s is None:
            scene.violations.append(f"S5: not as before after {scene.bounds.settle_s:g} s: {cluster.trouble()}")
            settled_s = scene.bounds.settle_s
        begun_s = time.monotonic()
        while again := self._not_whole(scene):
            if time.monotonic() - begun_s > scene.bounds.settle_s:
                scene.violations.append(f"after healing: {again[0]}")
                break
        self.after(scene)
        return settled_s + time.monotonic() - begun_s

    def _not_whole(self, scene: Scene) -> tuple[str, ...]:
        """What an answer lacks. An answer that was called right and was not is a violation at any time."""
        question = scene.rng.choice(scene.cluster.model.questions)
        client = scene.cluster.ask(question, CHECK_TOKENS)
        client.join(scene.bounds.patience_s)
        scene.cluster.heard(client.answer)
        expected = Expected(exact=True, stall_s=float("inf"))
        again = judge(client.answer, scene.cluster.truth(question, CHECK_TOKENS), expected, float("inf"))
        if again.wrong:
            scene.violations.append(f"after healing: {again.violations[0]}")
        return again.violations if not again.wrong else ()


def reach(scene: Scene, client: Client, tokens: int) -> None:
    """Wait for the moment of the fault: somewhere in the prompt, or at some token of the answer."""
    if scene.phase == "prefill":
        time.sleep(scene.cluster.prefill_s * scene.rng.uniform(0.15, 0.7))
    else:
        at = scene.rng.randrange(3, max(4, tokens // 2))
        client.until(lambda answer: len(answer.ids) >= at, 30.0)


class Check(Fault):
    """A fault that concerns no answer: a command, a file, a start. It needs no cluster unless it says so."""

    copies = (0,)
    phases = ("",)

    def check(self, scene: Checkup) -> None:
        """Look; write violations into the scene."""
        raise NotImplementedError

    def examine(self, folder: Path, rng: random.Random, number: int, bounds: Bounds) -> TryRecord:
        """Try it once, in a folder of its own."""
        scene = Checkup(folder, rng, number, bounds)
        begun_s = time.monotonic()
        folder.mkdir(parents=True)
        self.check(scene)
        return TryRecord(
            fault=self.id,
            number=number,
            seed="",
            copies=0,
            phase="",
            seconds=time.monotonic() - begun_s,
            longest_pause_s=scene.longest_s,
            leftovers=tuple(scene.leftovers),
            violations=tuple(scene.violations),
            notes=tuple(scene.notes),
        )


@dataclass(slots=True)
class Checkup:
    """One try of a `Check`."""

    folder: Path
    rng: random.Random
    number: int
    bounds: Bounds
    notes: list[str] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    leftovers: list[str] = field(default_factory=list)
    longest_s: float = 0.0

    def choose(self, kinds: Sequence[str]) -> str:
        """One kind after the other. Noted."""
        kind = kinds[self.number % len(kinds)]
        self.notes.append(kind)
        return kind

    def require(self, good: object, complaint: str) -> None:
        """Write down a violation unless it is good."""
        if not good:
            self.violations.append(complaint[:MOST_WORDS])


def record(
    fault: Fault, scene: Scene, verdicts: list[Verdict], settled_s: float, leftovers: list[str], seconds: float
) -> TryRecord:
    """What a try came to."""
    cluster, answers = scene.cluster, scene.answers
    pairs = list(zip(answers, verdicts, strict=True))
    return TryRecord(
        fault=fault.id,
        number=scene.number,
        seed="",
        copies=cluster.spec.copies,
        phase=scene.phase,
        backend=cluster.air.name if cluster.air else "",
        answers=len(answers),
        completed=sum(answer.complete for answer in answers),
        exact=sum(verdict.exact for verdict in verdicts),
        admitted=sum(answer.complete and not v.exact and not v.wrong for answer, v in pairs),
        refused=sum(bool(answer.error) and answer.told for answer in answers),
        wrong=sum(verdict.wrong for verdict in verdicts),
        longest_pause_s=round(max((verdict.pause_s for verdict in verdicts), default=0.0), 3),
        settled_s=round(settled_s, 3),
        seconds=round(seconds, 2),
        leftovers=tuple(leftovers),
        violations=tuple(each[:MOST_WORDS] for each in scene.violations),
        notes=(*cluster.notes, *scene.notes),
    )


__all__ = ["Check", "Checkup", "ClusterError", "Fault", "Impossible", "Scene"]
