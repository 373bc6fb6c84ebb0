"""Set our attacks beside torchattacks' on the undefended shipped classifier, at equal budgets.

Both sides get the same images, norm, eps, steps, targets and restarts, and start at random in the
ball (Square: at stripes in Linf, at bumps in L2). An image counts as broken where any iterate of an
ascent was wrong, on both sides, and for PGD where the last one is. torchattacks' Square stretches
its schedule to the budget, so ours is told to. Images that the classifier gets wrong as they are
count as broken. Prints a Markdown table of robust accuracies:

    python benchmarks/references.py --images 1000
    python benchmarks/references.py --norm L2 --eps 0.5

Without options it runs 200 validation images.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn

from ebm_defense import load_data, load_defense
from ebm_defense._torchvision import torchvision
from ebm_defense.attacks import (
    APGD,
    DLR,
    PGD,
    Attack,
    Margin,
    Square,
    TargetedAPGD,
    ThreatModel,
)

CLASSES = 10


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What every attack may spend.

    Attributes:
        norm: Linf or L2; torchattacks attacks in no other.
        eps: in [0, 1] pixel units.
        steps: of PGD and APGD.
        queries: of Square.
        seed: of both sides.
    """

    norm: str
    eps: float
    steps: int
    queries: int
    seed: int

    @property
    def threat(self) -> ThreatModel:
        """The threat model of our side."""
        return ThreatModel(norm=self.norm, eps=self.eps)

    @property
    def ball(self) -> dict[str, Any]:
        """The threat model of the other side, and the seed."""
        return {"norm": self.norm, "eps": self.eps, "seed": self.seed}


class Pair(NamedTuple):
    """One attack on both sides: ours, and torchattacks' name and settings for it."""

    ours: Callable[[Budget], Attack]
    theirs: Callable[[Budget], str]
    settings: Callable[[Budget], dict[str, Any]]


PAIRS = {
    "PGD": Pair(
        lambda b: PGD(threat=b.threat, steps=b.steps, step_size=b.eps / 4, replicates=1),
        lambda b: {"Linf": "PGD", "L2": "PGDL2"}[b.norm],
        lambda b: {"eps": b.eps, "alpha": b.eps / 4, "steps": b.steps},
    ),
    "APGD-CE": Pair(
        lambda b: APGD(threat=b.threat, steps=b.steps),
        lambda b: "APGD",
        lambda b: b.ball | {"steps": b.steps, "loss": "ce"},
    ),
    "APGD-DLR": Pair(
        lambda b: APGD(threat=b.threat, steps=b.steps, loss=DLR()),
        lambda b: "APGD",
        lambda b: b.ball | {"steps": b.steps, "loss": "dlr"},
    ),
    "APGD-T": Pair(
        lambda b: TargetedAPGD(threat=b.threat, steps=b.steps, targets=CLASSES - 1),
        lambda b: "APGDT",
        lambda b: b.ball | {"steps": b.steps, "n_classes": CLASSES},
    ),
    "Square": Pair(
        lambda b: Square(threat=b.threat, steps=b.queries, loss=Margin(), rescale=True),
        lambda b: "Square",
        lambda b: b.ball | {"n_queries": b.queries, "loss": "margin"},
    ),
}


def ours(attack: Attack, model: nn.Module, images: Tensor, labels: Tensor, seed: int) -> Tensor:
    """Return our attack's images; what it hands back is wrong if any iterate it may keep was."""
    found = [
        attack(model, x, y, seed=seed + part)  # type: ignore[operator]
        for part, (x, y) in enumerate(zip(images.split(100), labels.split(100), strict=True))
    ]
    return torch.cat(found)


def theirs(pair: Pair, model: nn.Module, images: Tensor, labels: Tensor, budget: Budget) -> Tensor:
    """Return torchattacks' images."""
    torchvision("datasets")  # torchattacks imports it, and it does not load everywhere by itself
    import torchattacks

    with torch.random.fork_rng():
        torch.manual_seed(budget.seed)
        attack = getattr(torchattacks, pair.theirs(budget))(model, **pair.settings(budget))
        found: Tensor = attack(images, labels).detach()
    return found


def robust(
    model: nn.Module, images: Tensor, labels: Tensor, originals: Tensor, threat: ThreatModel
) -> float:
    """Return the percentage of images still right, within the threat model."""
    images = threat.project(images, originals)
    with torch.no_grad():
        return 100.0 * float((model(images).argmax(1) == labels).float().mean())


def compare(name: str, pair: Pair, model: nn.Module, data: Any, budget: Budget) -> dict[str, Any]:
    """Run one attack on both sides, on the images that are right as they are."""
    with torch.no_grad():
        right = model(data.images).argmax(1) == data.labels
    images, labels, share = data.images[right], data.labels[right], float(right.float().mean())
    begun = time.perf_counter()
    mine = ours(pair.ours(budget), model, images, labels, budget.seed)
    turned = time.perf_counter()
    other = theirs(pair, model, images, labels, budget)
    ended = time.perf_counter()
    a, b = (share * robust(model, x, labels, images, budget.threat) for x in (mine, other))
    return {
        "attack": name,
        "ours (%)": f"{a:.1f}",
        "torchattacks (%)": f"{b:.1f}",
        "difference": f"{a - b:+.1f}",
        "ours (s)": f"{turned - begun:.0f}",
        "torchattacks (s)": f"{ended - turned:.0f}",
    }


def main() -> None:
    """Parse the options, run the pairs, print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--defense", default="fashion-mnist", help="whose undefended classifier")
    parser.add_argument("--images", type=int, default=200, help="a stratified sample")
    parser.add_argument("--norm", default="Linf", choices=["Linf", "L2"])
    parser.add_argument("--eps", type=float, default=0.02, help="in [0, 1] pixel units")
    parser.add_argument("--steps", type=int, default=100, help="of PGD and APGD")
    parser.add_argument("--queries", type=int, default=1000, help="of Square")
    parser.add_argument("--attacks", nargs="+", default=list(PAIRS), choices=list(PAIRS))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    budget = Budget(
        norm=options.norm,
        eps=options.eps,
        steps=options.steps,
        queries=options.queries,
        seed=options.seed,
    )
    data = load_data("fashion-mnist", "val", options.images)
    model = load_defense(options.defense).undefended.eval().requires_grad_(False)
    with torch.no_grad():
        clean = float((model(data.images).argmax(1) == data.labels).float().mean())
    print(
        f"The undefended classifier of {options.defense}, {options.images} validation images, "
        f"clean {100 * clean:.1f}%, {budget.threat}, {options.steps} steps, "
        f"{options.queries} queries, seed {options.seed}."
    )
    rows = []
    for name in options.attacks:
        rows.append(compare(name, PAIRS[name], model, data, budget))
        print(rows[-1], flush=True)
    print(pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True))


if __name__ == "__main__":
    main()
