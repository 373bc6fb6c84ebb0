"""One evaluation: everything that its records depend on, and what it costs on the way."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from torch import Tensor
from tqdm import tqdm

from ebm_defense.defense import PurifiedClassifier
from ebm_defense.eval.judging.judge import Stream
from ebm_defense.eval.protocols.protocol import Protocol
from ebm_defense.eval.storage.run_folder import Costs


@dataclass(kw_only=True)
class Meter:
    """Counts chain-steps and seconds by phase, and shows the time left.

    Attributes:
        total: chain-steps if every image stands to the end.
        show: whether to draw a progress bar; None draws it on a terminal.
    """

    total: int
    show: bool | None = None
    steps: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        disable = None if self.show is None else not self.show
        self.bar = tqdm(
            total=self.total, unit="step", unit_scale=True, disable=disable, smoothing=0.02
        )
        self.phase, self.since = "", time.perf_counter()

    def enter(self, phase: str) -> None:
        """Begin a phase."""
        now = time.perf_counter()
        if self.phase:
            self.seconds[self.phase] = self.seconds.get(self.phase, 0.0) + now - self.since
        self.phase, self.since = phase, now
        self.bar.set_description(phase)

    def count(self, steps: int) -> None:
        """Count chain-steps of the phase."""
        self.steps[self.phase] = self.steps.get(self.phase, 0) + steps
        self.bar.update(steps)

    def take(self) -> Costs:
        """End the phase, and return and forget what was counted since the last time."""
        self.enter("")
        costs: Costs = {"steps": dict(self.steps), "seconds": self.seconds}
        self.steps, self.seconds = {}, {}
        return costs

    def settle(self, planned: int) -> None:
        """Correct the total once a shard is done: broken images cost less than planned."""
        self.bar.total = self.bar.n + planned
        self.bar.refresh()

    def close(self) -> None:
        """End the bar."""
        self.bar.close()


@dataclass(frozen=True, kw_only=True)
class Job:
    """An evaluation of one model on one set of images: everything the records depend on."""

    defense: PurifiedClassifier
    images: Tensor
    labels: Tensor
    protocol: Protocol
    seed: int

    def stream(self, purpose: str, replicates: int, meter: Meter) -> Stream:
        """Return a stream of this job's own, for one purpose."""
        return Stream(self.seed, purpose, replicates, meter.count)

    def check(self, classes: int) -> None:
        """Refuse, before any long work, attacks that cannot attack a model of so many classes.

        Raises:
            UsageError: what an attack's own `check` refuses.
        """
        for attack in self.protocol.attacks:
            attack.check(self.defense, self.images, classes)

    @cached_property
    def bare(self) -> PurifiedClassifier | None:
        """The undefended classifier beside a defended one; None where nothing is defended."""
        if self.defense.purifier.identity:
            return None
        bare = self.defense.bare()
        bare.check_deterministic(self.images)
        return bare


class Part(NamedTuple):
    """Some of a job's images, with their labels and their numbers in the job."""

    images: Tensor
    labels: Tensor
    ids: list[int]
