"""The README's comparison: two energies, two baselines and no defense, under one protocol.

    python benchmarks/comparison.py                 # half an hour on one CPU core
    python benchmarks/comparison.py --images 16

Transfer, BPDA+EOT, and PGD through the chain by the gradient that fits the energy, on the same test
images. Runs resume; the table, as text, Markdown, LaTeX, CSV and HTML, and the figures lie in
OUT/comparison.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

from ebm_defense import PurifiedClassifier, load_data, load_defense
from ebm_defense.attacks import PGD, ThreatModel, Transfer
from ebm_defense.data import Images
from ebm_defense.eval import Protocol, compare, evaluate, load_run
from ebm_defense.eval.protocols.presets import fitting_gradient
from ebm_defense.files import writable_folder, write_text
from ebm_defense.purifiers.base import baseline
from ebm_defense.runtime.memory import keep_freed_memory

EPS = 0.1
RESULTS = Path(__file__).parent / "results"


def undefended(purifier: str) -> PurifiedClassifier:
    """Return the natural classifier behind a baseline purifier."""
    return PurifiedClassifier(load_defense("fashion-mnist").undefended, baseline(purifier), seed=0)


DEFENSES: dict[str, Callable[[], PurifiedClassifier]] = {
    "undefended": lambda: undefended("none"),
    "JPEG 75": lambda: undefended("jpeg:75"),
    "Gaussian noise": lambda: load_defense("fashion-mnist-gaussian", seed=0),
    "EBM, LeakyReLU": lambda: load_defense("fashion-mnist", seed=0),
    "EBM, smooth": lambda: load_defense("fashion-mnist-smooth", seed=0),
}


def protocol(defense: PurifiedClassifier, data: Images) -> Protocol:
    """Return transfer, BPDA+EOT, and PGD through the chain; around it where there is none."""
    pgd = PGD(threat=ThreatModel(eps=EPS), steps=20, step_size=EPS / 4, replicates=8)
    through = dataclasses.replace(pgd, gradient=fitting_gradient(defense, data.images))
    attacks = (Transfer(attack=pgd, replicates=8), pgd, through)
    return Protocol(name="comparison", attacks=attacks, judge_replicates=64)


def main() -> int:
    """Evaluate each, compare, print, and keep the table in benchmarks/results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("runs/comparison"))
    given = parser.parse_args()
    keep_freed_memory()
    folder = writable_folder(given.out)
    data = load_data("fashion-mnist", "test", given.images)
    runs = {name: folder / f"run-{i}-{given.images}" for i, name in enumerate(DEFENSES)}
    for name, run in runs.items():
        defense = DEFENSES[name]()
        report = evaluate(defense, *data, protocol(defense, data), seed=0, out=run)
        print(report.to_text(), flush=True)
    comparison = compare([load_run(run, name=name) for name, run in runs.items()])
    print(comparison.to_markdown())
    print(f"Table and figures were saved in {comparison.save(folder / 'comparison')}")
    write_text(writable_folder(RESULTS) / "comparison.md", comparison.to_markdown() + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
