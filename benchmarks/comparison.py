"""The README's comparison: two energies, two baselines and no defense, under one protocol.

    python benchmarks/comparison.py                 # half an hour on one CPU core
    python benchmarks/comparison.py --images 16

Transfer, BPDA+EOT, and PGD through the chain by the gradient that fits the energy, on the same test
images. Runs resume; the table, as text, Markdown, LaTeX, CSV and HTML, and the figures lie in
OUT/comparison/comparison.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass

from common import Options, Result, main

from ebm_defense import PurifiedClassifier, load_data, load_defense
from ebm_defense.attacks import PGD, ThreatModel, Transfer
from ebm_defense.attacks.gradients.registry import fitting_gradient
from ebm_defense.data import Images
from ebm_defense.eval import Protocol, compare, evaluate, load_run
from ebm_defense.purifiers.registry import baseline

EPS = 0.1


def undefended(purifier: str) -> PurifiedClassifier:
    """Return the natural classifier behind a baseline purifier."""
    return PurifiedClassifier(load_defense("fashion-mnist").undefended, baseline(purifier), seed=0)


DEFENSES: dict[str, Callable[[], PurifiedClassifier]] = {
    "undefended": lambda: undefended("none"),
    "JPEG 75": lambda: undefended("jpeg:75"),
    "Gaussian noise": lambda: load_defense("fashion-mnist-gaussian", seed=0),
    "EBM, long run": lambda: load_defense("fashion-mnist-longrun", seed=0),
    "EBM, learned in front": lambda: load_defense("fashion-mnist", seed=0),
}


def protocol(defense: PurifiedClassifier, data: Images) -> Protocol:
    """Return transfer, BPDA+EOT, and PGD through the chain; around it where there is none."""
    pgd = PGD(threat=ThreatModel(eps=EPS), steps=20, step_size=EPS / 4, replicates=8)
    through = dataclasses.replace(pgd, gradient=fitting_gradient(defense, data.images))
    attacks = (Transfer(attack=pgd, replicates=8), pgd, through)
    return Protocol(name="comparison", attacks=attacks, judge_replicates=64)


@dataclass(frozen=True, kw_only=True)
class Comparison(Options):
    """Set energies, baselines and no defense side by side under one protocol."""

    images: int = 64
    """How many test images."""

    def run(self) -> Result:
        """Evaluate each, compare, and save table and figures in OUT/comparison."""
        folder = self.out / "comparison"
        data = load_data("fashion-mnist", "test", self.images)
        runs = {name: folder / f"run-{i}-{self.images}" for i, name in enumerate(DEFENSES)}
        for name, run in runs.items():
            defense = DEFENSES[name]()
            report = evaluate(defense, *data, protocol(defense, data), seed=self.seed, out=run)
            print(report.to_text(), flush=True)
        found = compare([load_run(run, name=name) for name, run in runs.items()])
        print(f"Table and figures were saved in {found.save(folder / 'comparison')}")
        return Result("comparison", found.to_markdown(), self.images * len(runs))


if __name__ == "__main__":
    sys.exit(main(Comparison))
