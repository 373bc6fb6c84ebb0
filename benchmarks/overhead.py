"""What share of an evaluation is neither chains nor classifier: the harness's own cost.

Times every call of the purifier and of the classifier, forward and backward, against the whole of
`evaluate`, folder and tables included.

    python benchmarks/overhead.py --images 32 --protocol quick
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ebm_defense import PurifiedClassifier, load_data, load_defense
from ebm_defense.eval import evaluate, get_protocol
from ebm_defense.runtime.memory import keep_freed_memory

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


def measure(defense_name: str, images: int, protocol: str) -> tuple[float, float]:
    """Return the seconds of an evaluation, and those of its chains and classifier."""
    defense, data = load_defense(defense_name), load_data("fashion-mnist-sample", limit=images)
    chosen = get_protocol(protocol, eps=0.1)
    with tempfile.TemporaryDirectory() as out, watched(defense) as clock:
        begun = time.perf_counter()
        evaluate(defense, data.images, data.labels, chosen, out=f"{out}/run")
        return time.perf_counter() - begun, clock.seconds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--defense", default="fashion-mnist")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--protocol", default="quick")
    parser.add_argument("--profile", action="store_true", help="print where the time goes")
    options = parser.parse_args()
    keep_freed_memory()
    profile = cProfile.Profile()
    if options.profile:
        profile.enable()
    whole, inside = measure(options.defense, options.images, options.protocol)
    profile.disable()
    if options.profile:
        pstats.Stats(profile).sort_stats("tottime").print_stats(TOP)
    share = 1.0 - inside / whole
    print(f"{whole:.1f} s, of which chains and classifier {inside:.1f} s: overhead {share:.2%}")


if __name__ == "__main__":
    main()
