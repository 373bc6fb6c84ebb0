"""What each attack leaves of a network whose exact robust accuracy is published.

    python benchmarks/known_network.py --weights wong2018-fashion-mnist-0.1.safetensors

The convolutional network of Wong and Kolter (2018), trained to be provably robust at Linf 0.1 on
Fashion-MNIST. Of the first 1,000 test images 67.6% stand whatever is done to them: the bounds of a
mixed-integer programme agree (Croce, Andriushchenko, Hein 2019). So an attack leaves that much or
more, and a verdict below it would be wrong.

The weights are a state_dict as safetensors: convolutions of 16 and 32 channels, 4×4, stride 2, and
dense layers of 100 and 10.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import Options, Result, accuracy, main, table
from torch import nn

from ebm_defense import load_data
from ebm_defense.errors import UsageError
from ebm_defense.eval import Report, evaluate, get_protocol
from ebm_defense.eval.storage.columns import WORST_OF_ALL
from ebm_defense.storage.files import load_tensors

EPS, EXACT = 0.1, 0.676
"""The published accuracy is of the first 1,000 test images."""


@dataclass(frozen=True, kw_only=True)
class KnownNetwork(Options):
    """Attack the network by protocol standard, and hold what is left against the exact number."""

    weights: Path
    """The network's state_dict, a safetensors file."""
    data_root: Path | None = None
    """Where Fashion-MNIST lies."""
    images: int = 1000
    """How many of the first test images."""
    steps: int = 100
    """Gradient steps of each attack."""
    replicates: int = 20
    """A deterministic network needs one; four others buy a restart."""

    def run(self) -> Result:
        """Evaluate, and refuse a verdict below the exact number."""
        data = load_data("fashion-mnist", "test", root=self.data_root)
        images, labels = data.images[: self.images], data.labels[: self.images]
        protocol = get_protocol(
            "standard", eps=EPS, steps=self.steps, replicates=self.replicates, judge_replicates=1
        )
        run = self.out / f"known-network-{self.images}-{self.steps}-{self.replicates}"
        begun = time.perf_counter()
        report = evaluate(network(self.weights), images, labels, protocol, seed=self.seed, out=run)
        hours = (time.perf_counter() - begun) / 3600
        if self.images == 1000 and report.robust().value < EXACT:
            raise UsageError("fewer images stand than the mixed-integer programme proves.")
        text = f"{table(rows(report))}\n\n{caption(report, hours)}"
        return Result("known-network", text, len(images) * len(report.protocol.attacks))


def network(weights: Path) -> nn.Module:
    """Return the published network of [0, 1] images."""
    made = nn.Sequential(
        nn.Conv2d(1, 16, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 7 * 7, 100),
        nn.ReLU(),
        nn.Linear(100, 10),
    )
    made.load_state_dict(load_tensors(weights))
    return made.requires_grad_(False).eval()


def rows(report: Report) -> Iterator[dict[str, Any]]:
    """Yield what stands, of the images as they are and after each attack on what stood before."""
    yield {"attack": "clean", **accuracy(report.share("clean"), "accuracy %")}
    for number, attack in enumerate(report.protocol.attacks):
        yield {"attack": attack.name, **accuracy(report.robust(number), "accuracy %")}
    yield {"attack": WORST_OF_ALL, **accuracy(report.robust(), "accuracy %")}


def caption(report: Report, hours: float) -> str:
    """Return everything else that the numbers depend on."""
    return (
        f"{report.caption()} The published exact robust accuracy of the first 1,000 test images is "
        f"{100 * EXACT:.1f}%. {hours:.1f} hours."
    )


if __name__ == "__main__":
    sys.exit(main(KnownNetwork))
