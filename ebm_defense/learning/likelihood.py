"""λ times maximum likelihood beside another loss, so that an energy's samples stay images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ebm_defense.errors import UsageError
from ebm_defense.langevin import LangevinSettings, run_chain
from ebm_defense.learning.bank import Start, noisy_data, visit
from ebm_defense.learning.energy import PIXEL_LIMIT, DivergedError
from ebm_defense.noise import GeneratorNoise


@dataclass(frozen=True, kw_only=True)
class Likelihood:
    """How much the likelihood counts, and the chains that estimate it.

    Attributes:
        weight: λ > 0.
        bank: persistent chains.
        batch: data images, and chains, an update, at most `bank`.
        steps: Langevin steps between two updates, with the defense's own s and σ.
        data_noise: σ of the noise on training images, in [-1, 1] units.
        rejuvenation: probability that a visited chain starts afresh.
    """

    weight: float
    bank: int = 2_000
    batch: int = 50
    steps: int = 3
    data_noise: float = 0.05
    rejuvenation: float = 0.05

    def __post_init__(self) -> None:
        if not 0 < self.weight < float("inf"):
            raise UsageError(f"the likelihood's weight must be above 0, not {self.weight}.")
        if not 1 <= self.batch <= self.bank or self.steps < 1:
            raise UsageError("the likelihood's batch must lie between 1 and its bank, steps ≥ 1.")
        if not (0 <= self.rejuvenation <= 1 and self.data_noise >= 0):
            raise UsageError("rejuvenation must lie in [0, 1] and data_noise be 0 or more.")


class LikelihoodTerm:
    """The loss λ·(mean U(data) − mean U(chains))/T of an energy, with its bank of chains.

    Args:
        settings: all numbers.
        images: training images `[N, C, H, W]` in [0, 1].
        generator: what the bank's first states are drawn with.
    """

    def __init__(self, settings: Likelihood, images: Tensor, generator: torch.Generator) -> None:
        self.settings, self.images = settings, images * 2.0 - 1.0
        self.start = Start(kind="data", images=self.images, noise=settings.data_noise)
        self.bank = self.start.draw(settings.bank, generator)

    def __call__(
        self, energy: nn.Module, chain: LangevinSettings, generator: torch.Generator
    ) -> Tensor:
        """Run the visited chains, keep where they end, and return the loss.

        Raises:
            DivergedError: a chain left ±6.
        """
        s = self.settings
        rows, states = visit(self.bank, self.start, s.batch, s.rejuvenation, generator)
        device = next(energy.parameters()).device
        moves = LangevinSettings(
            steps=s.steps, step_size=chain.step_size, temperature=chain.temperature
        )
        ends = run_chain(
            states.to(device), GeneratorNoise(generator), energy=energy, settings=moves
        )
        if not float(ends.abs().max()) < PIXEL_LIMIT:
            raise DivergedError(
                "a chain of the likelihood's bank left ±6; raise its weight or lower the learning "
                "rate, and resume from the last checkpoint."
            )
        self.bank[rows] = ends.cpu()
        data = noisy_data(self.images, s.batch, s.data_noise, generator).to(device)
        difference = energy(data).mean() - energy(ends).mean()
        return s.weight * difference / chain.temperature
