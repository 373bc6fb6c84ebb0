"""Learn two densities of the plane by chains that converge and by chains that do not.

    python benchmarks/toys.py                       # half an hour on two CPU cores
    python benchmarks/toys.py --toys mixture --seeds 2

Eight Gaussians on a circle and four rings (Nijkamp et al. 2019, Anatomy), whose densities are
known: how far a learned density is from the truth is a sum over a fine grid. Each is learned twice
by one network: by adjusted chains that forget where they began, and, as in that paper's
non-convergent learning, by short chains of small steps from noise. The verdict of `diagnose` on
long chains is asked which is which. What is finished is kept in OUT and not done again.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import ROOT, Options, Result, main, table
from torch import Tensor

from ebm_defense.data.points import POINTS, Points
from ebm_defense.energies.points import PointEnergy, PointEnergySettings
from ebm_defense.langevin import LangevinSettings
from ebm_defense.learning.diagnosis.convergence import CONVERGENT, judge_convergence, long_runs
from ebm_defense.learning.diagnosis.divergence import BOX, divergence, grid
from ebm_defense.learning.energies.recipe import EnergyRecipe
from ebm_defense.learning.energies.trainer import EnergyTrainer
from ebm_defense.storage.files import atomic, load_tensors, save_tensors, write_text

DRAWN, CHAINS, NEAR = 20_000, 48, 0.1
"""Points to learn from, chains of a diagnosis, their steps, and the divergence that is near."""


CONVERGENT_WAYS = {
    # Never renewed, from noise.
    "mixture": EnergyRecipe(
        updates=600, batch=200, bank=200, fresh="noise", rejuvenation=0.0, adam_lr=2e-3,
        langevin=LangevinSettings(steps=20, temperature=0.5 * 0.125**2, adjusted=True),
    ),
    # Rings are far apart for a chain; those that are renewed from data keep each ring's share.
    "rings": EnergyRecipe(
        updates=900, batch=400, bank=2_000, fresh="data", rejuvenation=0.05, adam_lr=3e-3,
        langevin=LangevinSettings(steps=20, temperature=1.0, adjusted=True),
    ),
}  # fmt: skip
NETWORKS = {
    "mixture": PointEnergySettings(reach=3.0),
    "rings": PointEnergySettings(reach=20.0, radial=True, activation="silu"),
}
"""The finer the structure, the larger the units in which the network sees the points."""
LONG = {"mixture": (4_000, 1.0), "rings": (8_000, 4.0)}
"""Steps of the chains that judge, and how many times longer each is than in convergent learning:
from ring to ring is a far way, which exact chains may take in larger steps."""
STEP, SMALL, LIVED = 0.25, 0.01, 400
"""Steps of both ways, in the density's own units, and how long chains of learning count as."""


def ways(toy: str, points: Points, seed: int) -> dict[str, EnergyRecipe]:
    """Return both ways to learn a density."""
    shared = {"data_noise": 0.0, "final_lr": 1e-5, "average": 0.99, "limit": 1e9, "seed": seed}
    long = CONVERGENT_WAYS[toy]
    chain = replace(long.langevin, step_size=STEP / points.reach)
    # ε = 0.01 and T = ε²/2, K = 100 and Adam at 1e-4, as published.
    short = LangevinSettings(steps=100, step_size=SMALL / points.reach, temperature=0.5 * SMALL**2)
    return {
        "convergent": replace(long, **(shared | {"langevin": chain})),
        "not convergent": EnergyRecipe(
            updates=200, batch=100, start="noise", adam_lr=1e-4,
            **(shared | {"langevin": short, "final_lr": 1e-4}),
        ),
    }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Toys(Options):
    """Learn, integrate, diagnose, and draw what was learned."""

    toys: tuple[str, ...] = tuple(POINTS)
    """mixture, rings or both."""
    seeds: int = 10
    """How many of each, from --seed."""
    figure: Path = ROOT / "docs" / "toys.png"
    """Where the densities of the first seed are drawn."""

    def run(self) -> Result:
        """Learn what is not learned yet; tell both ways apart."""
        rows = [row for toy in self.toys for row in self._rows(toy)]
        draw(self.figure, {toy: self._densities(toy) for toy in self.toys})
        found = table(rows)
        caption = (
            f"KL(truth ‖ learned) in nats by integration on a grid, and the verdict on {CHAINS} "
            f"chains from data and {CHAINS} from noise, {_lengths()}: least and largest "
            f"over the seeds {self.seed} to {self.seed + self.seeds - 1}."
        )
        return Result("toys", f"{found}\n\n{caption}", self.seeds * len(self.toys))

    def _rows(self, toy: str) -> Iterator[dict[str, Any]]:
        each = [{way: self._learned(toy, way, seed) for way in WAYS} for seed in self._seeds]
        found = {way: [results[way] for results in each] for way in WAYS}
        for way, results in found.items():
            distances = [r["kl"] for r in results]
            near = sum(kl < NEAR for kl in distances)
            called = sum(r["verdict"] == CONVERGENT for r in results)
            yield {
                "density": toy,
                "learning": way,
                "KL": f"{min(distances):.3f} to {max(distances):.3f}",
                f"KL < {NEAR}": f"{near} of {len(results)}",
                "called convergent": f"{called} of {len(results)}",
            }

    @property
    def _seeds(self) -> range:
        return range(self.seed, self.seed + self.seeds)

    def _learned(self, toy: str, way: str, seed: int) -> dict[str, Any]:
        stem = self._stem(toy, way, seed)
        kept = stem.with_suffix(".json")
        if not kept.exists():
            found = learn(toy, way, seed, stem.with_suffix(".safetensors"))
            write_text(kept, json.dumps(found))
            print(f"{toy}, {way}, seed {seed}: {found}", flush=True)
        result: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
        return result

    def _stem(self, toy: str, way: str, seed: int) -> Path:
        return self.out / f"{toy}-{way.replace(' ', '-')}-{seed}"

    def _densities(self, toy: str) -> dict[str, Tensor]:
        points = POINTS[toy]()
        shown = {"truth": points.log_density(grid()).view(300, 300)}
        for way, recipe in ways(toy, points, self.seed).items():
            energy = network(toy, self.seed)
            file = self._stem(toy, way, self.seed).with_suffix(".safetensors")
            energy.load_state_dict(load_tensors(file))
            temperature = recipe.langevin.temperature
            shown[way] = divergence(energy, points.log_density, temperature).log_density
        return shown


WAYS = ("convergent", "not convergent")


def _lengths() -> str:
    return " and ".join(f"{steps:,} steps each on the {toy}" for toy, (steps, _) in LONG.items())


def network(toy: str, seed: int) -> PointEnergy:
    """Make the untrained energy of a seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return PointEnergy(NETWORKS[toy])


def learn(toy: str, way: str, seed: int, file: Path) -> dict[str, Any]:
    """Learn an energy, keep its weights, and return its divergence and the verdict on it."""
    points = POINTS[toy]()
    x = points.draw(DRAWN, torch.Generator().manual_seed(seed))
    recipe = ways(toy, points, seed)[way]
    energy = network(toy, seed)
    if file.exists():
        energy.load_state_dict(load_tensors(file))
    else:
        trainer = EnergyTrainer(energy, ((x + 1) / 2).clamp(0, 1), recipe, "fp32")
        for _ in trainer.run():
            pass
        energy.load_state_dict(trainer.averaged.module.state_dict())
        save_tensors(file, energy.state_dict())
    chain = _judging(toy, recipe.langevin)
    chains = long_runs(energy, x[:CHAINS], chain, seed=seed)
    verdict = judge_convergence(chains, learned_steps=LIVED)
    kl = divergence(energy, points.log_density, chain.temperature).kl
    return {"kl": kl, "verdict": verdict.verdict, "reason": verdict.reason}


def _judging(toy: str, learned: LangevinSettings) -> LangevinSettings:
    steps, longer = LONG[toy]
    if not learned.adjusted:  # its step is part of what it learned
        longer = 1.0
    return replace(learned, steps=steps, step_size=longer * learned.step_size)


def draw(path: Path, shown: dict[str, dict[str, Tensor]]) -> None:
    """Draw log densities, a row a toy: the truth, and what either way has learned."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.6, 2.6 * len(shown)), layout="constrained")
    axes = figure.subplots(len(shown), 1 + len(WAYS), squeeze=False)
    for line, densities in zip(axes, shown.values(), strict=True):
        for axis, (name, values) in zip(line, densities.items(), strict=True):
            top = float(values.max())
            picture = np.asarray(values).clip(top - 8, top)
            axis.imshow(picture, origin="lower", extent=(-BOX, BOX) * 2, cmap="viridis")
            axis.set(title=name, xticks=[], yticks=[], xlim=(-1.1, 1.1), ylim=(-1.1, 1.1))
    with atomic(path) as partial:
        figure.savefig(partial, dpi=110)


if __name__ == "__main__":
    sys.exit(main(Toys))
