"""λ times maximum likelihood beside another loss, so that an energy's samples stay images."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ebm_defense.errors import UsageError
from ebm_defense.interface.numbers import plain_numbers
from ebm_defense.langevin import LangevinSettings
from ebm_defense.learning.draws import Batch, Draws, batch_of
from ebm_defense.learning.energies.objectives import MaximumLikelihood
from ebm_defense.learning.energies.starts import FromData, Persistent
from ebm_defense.learning.energies.trainer import PIXEL_LIMIT, DivergedError
from ebm_defense.learning.parallel import Team


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
        plain_numbers(self)
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
        seed: of every draw.
        team: the processes that learn together, among whom the bank is shared out.

    Raises:
        UsageError: a batch that the team cannot share.
    """

    def __init__(
        self, settings: Likelihood, images: Tensor, seed: int, team: Team | None = None
    ) -> None:
        self.settings, self.images, self.seed = settings, images * 2.0 - 1.0, seed
        self.team = team or Team()
        self.team.refuse_uneven(settings.batch)
        source = FromData(self.images, settings.data_noise)
        first = self._batch(-1, settings.bank, images.device)
        self.start = Persistent(source, settings.bank, settings.rejuvenation, first, self.team)

    def _batch(self, update: int, whole: int, device: torch.device) -> Batch:
        places = self.team.places(whole)
        draws = Draws(seed=self.seed, update=update, places=places, batch=whole, device=device)
        return batch_of(self.images, draws)

    def __call__(self, energy: nn.Module, chain: LangevinSettings, update: int) -> Tensor:
        """Run the visited chains, keep where they end, and return the loss.

        Raises:
            DivergedError: a chain left ±6.
        """
        s, device = self.settings, next(energy.parameters()).device
        moves = replace(chain, steps=s.steps)
        likelihood = MaximumLikelihood(self.start, moves, s.data_noise, "fp32")
        found = likelihood.estimate(energy, self._batch(update, s.batch, device))
        if not float(found.furthest) < PIXEL_LIMIT:
            raise DivergedError(
                "a chain of the likelihood's bank left ±6; raise its weight or lower the learning "
                "rate, and resume from the last checkpoint."
            )
        likelihood.keep()
        return s.weight * found.loss
