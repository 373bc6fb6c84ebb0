"""Every start of chains and every way to learn an energy, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from ebm_defense.errors import UsageError
from ebm_defense.learning.draws import Batch
from ebm_defense.learning.energies.objectives import EnergyObjective, MaximumLikelihood
from ebm_defense.learning.energies.recipe import EnergyRecipe
from ebm_defense.learning.energies.recovery import RecoveryLikelihood
from ebm_defense.learning.energies.robust import RobustLoss
from ebm_defense.learning.energies.score_matching import ScoreMatching
from ebm_defense.learning.energies.starts import (
    BurnIn,
    Cooperative,
    FromBatch,
    FromData,
    FromGenerator,
    FromNoise,
    Persistent,
    Start,
)
from ebm_defense.learning.parallel import Team


class Parts(NamedTuple):
    """What starts and objectives are made from.

    Attributes:
        recipe: all settings.
        images: training images `[N, C, H, W]` in [-1, 1].
        places: (update, count) → this process's share of a batch of so many places; updates
            below 0 are for what is drawn before the first.
        precision: of the chains.
        team: the processes that learn together.
        generator: a network from latents to images in [-1, 1], which its settings count as `size`.
    """

    recipe: EnergyRecipe
    images: Tensor
    places: Callable[[int, int], Batch]
    precision: str
    team: Team
    generator: nn.Module | None = None


def _generator(parts: Parts) -> tuple[nn.Module, int]:
    if parts.generator is None:
        raise UsageError(
            "chains that start from a generator need one; give a generator, or start elsewhere."
        )
    settings: Any = parts.generator.settings
    return parts.generator, settings.size


def _persistent(parts: Parts) -> Persistent:
    r = parts.recipe
    source = make_start(r.fresh, parts)
    first = parts.places(-1, r.bank)
    return Persistent(source, r.bank, r.rejuvenation, first, parts.team, r.most_visits)


def _burn_in(parts: Parts) -> BurnIn:
    r = parts.recipe
    if r.fresh == "cooperative":
        raise UsageError(
            "a generator learns where chains end an update after they began; chains that burn in "
            "end far later, so give them a generator that has learned: fresh = generator."
        )
    if not r.batch <= r.burn_in <= r.bank:
        raise UsageError(
            f"burn_in must lie between the batch's {r.batch} and the bank's {r.bank} chains, not "
            f"{r.burn_in}."
        )
    source, team, first = make_start(r.fresh, parts), parts.team, parts.places(-2, r.burn_in)
    update = Persistent(source, r.bank, 0.0, parts.places(-1, r.bank), team)
    burning = Persistent(source, r.burn_in, 0.0, first, team)
    return BurnIn(update, burning, r.burn_in_visits, first)


STARTS: dict[str, Callable[[Parts], Start]] = {
    "noise": lambda parts: FromNoise(),
    "data": lambda parts: FromData(parts.images, parts.recipe.data_noise),
    "batch": lambda parts: FromBatch(parts.recipe.data_noise),
    "generator": lambda parts: FromGenerator(*_generator(parts)),
    "cooperative": lambda parts: Cooperative(
        *_generator(parts), parts.recipe.generator_lr, parts.team
    ),
    "persistent": _persistent,
    "burn-in": _burn_in,
}
"""By the name that recipes call it; a start of your own is one more entry."""

BANKS = ("persistent", "burn-in")
"""Starts that keep chains, which begin as another start says."""


def make_start(name: str, parts: Parts) -> Start:
    """Make a start of chains by its name in `STARTS`.

    Raises:
        UsageError: no such start, or a bank within a bank.
    """
    if name not in STARTS:
        raise UsageError(f"chains start from {', '.join(STARTS)}; there is no start {name!r}.")
    if parts.recipe.fresh in BANKS:
        raise UsageError(
            f"a bank's chains begin outside of banks; fresh is {parts.recipe.fresh!r}."
        )
    return STARTS[name](parts)


def _likelihood(parts: Parts) -> MaximumLikelihood:
    r = parts.recipe
    return MaximumLikelihood(make_start(r.start, parts), r.langevin, r.data_noise, parts.precision)


def _contrastive(parts: Parts) -> MaximumLikelihood:
    r = parts.recipe
    return MaximumLikelihood(FromBatch(r.data_noise), r.langevin, r.data_noise, parts.precision)


def _score(parts: Parts) -> ScoreMatching:
    r = parts.recipe
    loss = RobustLoss(r.loss_shape, r.loss_scale)
    return ScoreMatching(r.noise_levels, r.langevin.temperature, loss, parts.team)


def _recovery(parts: Parts) -> RecoveryLikelihood:
    r = parts.recipe
    return RecoveryLikelihood(r.noise_levels, r.langevin, r.data_noise, parts.precision)


OBJECTIVES: dict[str, Callable[[Parts], EnergyObjective]] = {
    "likelihood": _likelihood,
    "contrastive-divergence": _contrastive,
    "score-matching": _score,
    "recovery-likelihood": _recovery,
}
"""By the name that recipes call it; an objective of your own is one more entry."""


def make_objective(parts: Parts) -> EnergyObjective:
    """Make the objective that a recipe names.

    Raises:
        UsageError: no such objective, or settings that do not fit it.
    """
    name = parts.recipe.objective
    if name not in OBJECTIVES:
        raise UsageError(f"objective is {name!r}; choose one of {', '.join(OBJECTIVES)}.")
    return OBJECTIVES[name](parts)
