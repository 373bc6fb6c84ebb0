"""What two processes do together, for `test_scale`; started with torchrun's environment."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from ebm_defense.data import load_data
from ebm_defense.energies.conv import ConvEnergy, ConvEnergySettings
from ebm_defense.generators.networks import ConvGenerator, ConvSettings
from ebm_defense.langevin import LangevinSettings
from ebm_defense.learning.energies.recipe import EnergyRecipe
from ebm_defense.learning.energies.trainer import EnergyTrainer
from ebm_defense.learning.parallel import Team

EVERY, KILLED = 2, 7
"""Updates between two checkpoints, and the one during which a rank dies."""


def tiny_trainer(team: Team | None = None, **options: Any) -> EnergyTrainer:
    """Return a trainer of a tiny energy whose updates take milliseconds.

    By SGD, since Adam makes whole steps of what rounding leaves where a gradient is 0.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        energy = ConvEnergy(ConvEnergySettings(channels=1, image_size=8, width=2))
        generator = ConvGenerator(ConvSettings(channels=1, image_size=8, width=2, latent=4))
    chain = LangevinSettings(steps=3, step_size=0.05, temperature=1e-2)
    base: dict[str, Any] = {
        "updates": 12, "batch": 8, "bank": 21, "langevin": chain, "sgd_from": 0,
        "sgd_lr": 1e-2, "rejuvenation": 0.3, "data_noise": 0.1,
    }  # fmt: skip
    images = load_data("digits", "train").images[:60]
    recipe = EnergyRecipe(**(base | options))
    return EnergyTrainer(energy, images, recipe, "fp32", generator=generator, team=team)


def weights(trainer: EnergyTrainer) -> torch.Tensor:
    """Return all weights, their averages and the whole bank as one vector."""
    modules = (trainer.energy, trainer.averaged)
    parts = [p.detach().flatten() for m in modules for p in m.parameters()]
    return torch.cat([*parts, trainer.objective.state()["bank"].flatten()])


def momentum(trainer: EnergyTrainer) -> torch.Tensor:
    """Return the running mean of a cooperative generator's gradients."""
    state = trainer.objective.start.source.optimiser.state_dict()["state"]
    return torch.cat([moments["exp_avg"].flatten() for moments in state.values()])


def advance(trainer: EnergyTrainer, until: int, path: Path | None = None) -> None:
    """Update until so many are done, with checkpoints."""
    for update in trainer.run():
        if path is not None and update.number % EVERY == 0:
            trainer.save(path)
        if update.number == until:
            return


def main(folder: Path) -> None:
    """Learn together, go on from a checkpoint, and lose a rank."""
    torch.set_num_threads(1)
    team = Team.of(torch.device("cpu"))
    whole = tiny_trainer(team)
    advance(whole, 6, folder / "whole.pt")
    again = tiny_trainer(team)
    again.load(folder / "whole.pt")
    for trainer in (whole, again):
        advance(trainer, 10)
    exact = torch.equal(weights(whole), weights(again))
    pair = tiny_trainer(team, fresh="cooperative")
    advance(pair, 3)
    found = {
        "weights": weights(whole),
        "exact": exact,
        "history": torch.tensor(whole.history),
        "momentum": momentum(pair),
    }
    if team.leads:
        torch.save(found, folder / "found.pt")
    lost = tiny_trainer(team)
    if team.rank == 1:
        lost.objective.estimate = dying(lost)  # type: ignore[method-assign]
    advance(lost, 12, folder / "lost.pt")


def dying(trainer: EnergyTrainer) -> Any:
    """Return the trainer's estimate, which kills its process in the midst of an update."""
    estimate = trainer.objective.estimate

    def dies(*arguments: Any) -> Any:
        if trainer.done + 1 == KILLED:
            os.kill(os.getpid(), signal.SIGKILL)
        return estimate(*arguments)

    return dies


if __name__ == "__main__":
    main(Path(sys.argv[1]))
