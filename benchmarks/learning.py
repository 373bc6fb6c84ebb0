"""How fast an energy learns, chain and weight update apart, beside the published loop as it is.

The published loop (Nijkamp et al. 2019; Hill, Mitchell, Zhu 2021) takes the gradient of every
Langevin step by autograd, in one process, in fp32. Both learn the same network on the same batches
with as many steps; updates of the two take turns, and ratios are of neighbours.

    python benchmarks/learning.py
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from common import Options, Result, main, table
from torch import Tensor, nn

from ebm_defense.data import load_data
from ebm_defense.energies.conv import ConvEnergy, ConvEnergySettings, channels_last
from ebm_defense.errors import UsageError
from ebm_defense.langevin import LangevinSettings
from ebm_defense.learning.energies.recipe import EnergyRecipe
from ebm_defense.learning.energies.trainer import EnergyTrainer

SPREAD = 0.02
CHAIN = {"step_size": 0.01, "temperature": 5e-5}
"""As published for CIFAR-10."""


class Layout(NamedTuple):
    """A network and its batch."""

    settings: ConvEnergySettings
    batch: int
    steps: int


LAYOUTS = {
    "fashion-mnist-16": Layout(ConvEnergySettings(channels=1, image_size=28, width=16), 64, 40),
    "cifar10": Layout(ConvEnergySettings(), 100, 100),
}
"""The shipped energies' shape; the published network, with its batch and its steps."""


class Seconds(NamedTuple):
    """Of processor time, of an update's two parts."""

    chain: float
    update: float


Turn = Callable[[], Seconds]


def published(energy: nn.Module, images: Tensor, layout: Layout, seed: int) -> Turn:
    """Return the published update: a batch of persistent chains by autograd, then Adam."""
    draw = torch.Generator().manual_seed(seed)
    bank = torch.rand(images.shape, generator=draw) * 2.0 - 1.0
    optimiser = torch.optim.Adam(energy.parameters(), lr=1e-4)
    chain = LangevinSettings(steps=layout.steps, **CHAIN)

    def turn() -> Seconds:
        begun = time.process_time()
        rows = torch.randperm(len(bank), generator=draw)[: layout.batch]
        x, strength = bank[rows].clone().requires_grad_(), torch.zeros(())
        for _ in range(chain.steps):
            slope = torch.autograd.grad(energy(x).sum(), [x])[0]
            z = torch.randn(x.shape, generator=draw)
            x.data += -chain.drift * slope + chain.step_size * z
            strength += slope.flatten(1).norm(dim=1).mean()
        bank[rows] = x.detach()
        sampled = time.process_time()
        chosen = images[torch.randperm(len(images), generator=draw)[: layout.batch]]
        data = chosen + SPREAD * torch.randn(x.shape, generator=draw)
        loss = (energy(data).mean() - energy(x.detach()).mean()) / chain.temperature
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        return Seconds(sampled - begun, time.process_time() - sampled)

    return turn


def ours(energy: nn.Module, images: Tensor, layout: Layout, precision: str, seed: int) -> Turn:
    """Return this package's update, of the same numbers."""
    recipe = EnergyRecipe(
        updates=1_000_000,
        batch=layout.batch,
        bank=len(images),
        langevin=LangevinSettings(steps=layout.steps, **CHAIN),
        data_noise=SPREAD,
        fresh="noise",
        rejuvenation=0.0,
        final_lr=1e-4,
        limit=1e9,
        seed=seed,
    )
    trainer = EnergyTrainer(channels_last(energy), (images + 1.0) / 2.0, recipe, precision)
    objective: Any = trainer.objective
    sample, inside = objective.sample, [0.0]

    def timed(*arguments: Any) -> Any:
        begun = time.process_time()
        found = sample(*arguments)
        inside[0] += time.process_time() - begun
        return found

    objective.sample = timed
    run = trainer.run()

    def turn() -> Seconds:
        inside[0], begun = 0.0, time.process_time()
        next(run)
        whole = time.process_time() - begun
        return Seconds(inside[0], whole - inside[0])

    return turn


@dataclass(frozen=True, kw_only=True)
class Learning(Options):
    """Time updates of energy learning beside the published loop."""

    layouts: tuple[str, ...] = tuple(LAYOUTS)
    """Networks to time: fashion-mnist-16, cifar10."""
    repeats: int = 6
    """Updates of each kind that are timed, after one that is not."""
    images: int = 1_000
    """Training images, and chains."""

    def run(self) -> Result:
        """Time them in turns."""
        unknown = {*self.layouts} - {*LAYOUTS}
        if unknown or self.repeats < 1:
            raise UsageError(f"layouts are of {', '.join(LAYOUTS)}, and repeats at least 1.")
        rows = [row for name in self.layouts for row in self._rows(name, LAYOUTS[name])]
        text = (
            f"{table(rows)}\n\nMilliseconds of processor time of one thread, medians of "
            f"{self.repeats} updates that took turns; ratios of neighbours, with the range of the "
            "middle 80%. bf16 is of the chains alone; weights are updated in fp32. The update of "
            "this package includes its running average of the weights."
        )
        return Result("learning", text, self.repeats * len(self.layouts))

    def _rows(self, name: str, layout: Layout) -> Iterator[dict[str, str]]:
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            energy = ConvEnergy(layout.settings)
        images = self._images(layout.settings)
        turns = {
            "published loop": published(copy.deepcopy(energy), images, layout, self.seed),
            "fp32": ours(copy.deepcopy(energy), images, layout, "fp32", self.seed),
            "bf16": ours(copy.deepcopy(energy), images, layout, "bf16", self.seed),
        }
        for turn in turns.values():
            turn()
        taken = [[turn() for turn in turns.values()] for _ in range(self.repeats)]
        seconds = np.array(taken)  # [repeats, ways, parts]
        for i, way in enumerate(turns):
            yield {"energy": name, "batch × K": f"{layout.batch} × {layout.steps}", "way": way} | (
                _columns(seconds[:, i], seconds[:, 0])
            )

    def _images(self, s: ConvEnergySettings) -> Tensor:
        if s.channels == 1:
            return load_data("fashion-mnist", "train", self.images).images * 2.0 - 1.0
        draw = torch.Generator().manual_seed(self.seed)
        shape = (self.images, s.channels, s.image_size, s.image_size)
        return torch.rand(shape, generator=draw) * 2.0 - 1.0


def _columns(way: Any, published: Any) -> dict[str, str]:
    """Return the columns of a way's seconds `[repeats, parts]`."""
    whole, beside = way.sum(1), published.sum(1)
    shown = {"chain": way[:, 0], "update": way[:, 1], "both": whole}
    milliseconds = {f"{k} ms": f"{1000 * np.median(v):,.0f}" for k, v in shown.items()}
    low, high = np.quantile(beside / whole, [0.1, 0.9])
    return milliseconds | {
        "chain faster": f"{np.median(published[:, 0] / way[:, 0]):.2f}×",
        "both faster": f"{np.median(beside / whole):.2f}× ({low:.2f} to {high:.2f})",
    }


if __name__ == "__main__":
    sys.exit(main(Learning))
