"""What share of an evaluation is neither chains nor classifier: the harness's own cost.

Times every call of the purifier and of the classifier, forward and backward, against the whole of
`evaluate`, folder and tables included.

    python benchmarks/overhead.py --images 32 --protocol quick
"""

from __future__ import annotations

import cProfile
import pstats
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from common import OnImages, Result, main

from ebm_defense import PurifiedClassifier, load_data, load_defense
from ebm_defense.eval import evaluate, get_protocol

TOP = 12


class Stopwatch:
    """Seconds spent inside the functions it watches; nested calls count once."""

    def __init__(self) -> None:
        self.seconds, self.depth, self.since = 0.0, 0, 0.0

    def watch(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function with its time counted."""

        def timed(*args: Any, **options: Any) -> Any:
            if self.depth == 0:
                self.since = time.perf_counter()
            self.depth += 1
            try:
                return function(*args, **options)
            finally:
                self.depth -= 1
                if self.depth == 0:
                    self.seconds += time.perf_counter() - self.since

        return timed


@contextmanager
def watched(defense: PurifiedClassifier) -> Iterator[Stopwatch]:
    """Watch a defense's purifier and classifiers, and autograd's way back through them."""
    clock, backward = Stopwatch(), torch.autograd.grad
    for module in {defense.purifier, defense.classifier, defense.undefended}:
        module.forward = clock.watch(module.forward)
    torch.autograd.grad = clock.watch(backward)
    try:
        yield clock
    finally:
        torch.autograd.grad = backward


@dataclass(frozen=True, kw_only=True)
class Overhead(OnImages):
    """Measure what share of an evaluation is neither chains nor classifier."""

    data: str = "fashion-mnist-sample"
    """Data set."""
    images: int = 32
    """How many images, a stratified sample."""
    protocol: str = "quick"
    """Of the evaluation, at eps 0.1."""
    profile: bool = False
    """Print where the time goes, too."""

    def run(self) -> Result:
        """Time the evaluation, and what runs inside of chains and classifier."""
        profile = cProfile.Profile()
        if self.profile:
            profile.enable()
        whole, inside = self._seconds()
        profile.disable()
        if self.profile:
            pstats.Stats(profile).sort_stats("tottime").print_stats(TOP)
        text = (
            f"Protocol {self.protocol}, {self.defense}, {self.images} images: {whole:.1f} s, of "
            f"which chains and classifier {inside:.1f} s: overhead {1.0 - inside / whole:.2%}."
        )
        return Result("overhead", text, self.images)

    def _seconds(self) -> tuple[float, float]:
        """Return the seconds of an evaluation, and those of its chains and classifier."""
        defense = load_defense(self.defense)
        data = load_data(self.data, self.split, self.images)
        chosen = get_protocol(self.protocol, eps=0.1)
        with tempfile.TemporaryDirectory() as out, watched(defense) as clock:
            begun = time.perf_counter()
            evaluate(defense, *data, chosen, seed=self.seed, out=f"{out}/run")
            return time.perf_counter() - begun, clock.seconds


if __name__ == "__main__":
    sys.exit(main(Overhead))
