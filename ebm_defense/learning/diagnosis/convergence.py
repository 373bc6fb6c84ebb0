"""Whether an energy's chains converge: what the numbers of a few long chains decide.

An energy of non-convergent learning looks right only as long as its chains are young (Nijkamp et
al. 2019, "On the Anatomy of MCMC-Based Maximum Likelihood Learning"). What tells is where chains go
that run many times longer than those it was learned with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ebm_defense.engine.base import Energy
from ebm_defense.errors import UsageError
from ebm_defense.langevin import LangevinSettings, Trace, run_chain
from ebm_defense.noise import KeyedNoise, chain_keys
from ebm_defense.runtime.optional import optional

CONVERGENT, METASTABLE, NOT_CONVERGENT = "convergent", "metastable", "not convergent"
DRIFT_LIMIT = 1.0
"""How far chains' mean energy may lie from the data's, in standard deviations of the data's."""
RHAT_LIMIT = 1.1
SATURATION_LIMIT = 0.05
"""Share of a chain's pixels that may lie beyond `BEYOND` times what the data's ever reach."""
BEYOND = 1.5
TIMES = 10
"""How many times longer than in learning a chain must run for its age to tell."""


@dataclass(frozen=True, kw_only=True)
class Chains:
    """Long chains of one energy, from data and from noise.

    Attributes:
        steps: the steps at which images were kept, rising, from 0.
        data, noise: the chains' images at those steps, `[kept, b, C, H, W]` in [-1, 1] units.
        data_energy, noise_energy: U before every step, `[b, K]`.
        reference: U of fresh data with the noise that it was learned with, `[n]`.
        acceptance: the share of all steps that a Metropolis test accepted, of adjusted chains.
    """

    steps: tuple[int, ...]
    data: Tensor
    noise: Tensor
    data_energy: Tensor
    noise_energy: Tensor
    reference: Tensor
    acceptance: float | None = None


@dataclass(frozen=True, kw_only=True)
class Convergence:
    """What long chains say of an energy.

    Attributes:
        verdict: "convergent", "metastable" or "not convergent".
        until: the step up to which chains from data stay where the data is; the last one run where
            they never leave.
        drift: mean energy of the chains from data at the end, from the data's mean, in standard
            deviations of the data's.
        saturation: share of their pixels at the end beyond `BEYOND` times what the data's reach.
        rhat: rank-normalised split R-hat of the energies' second half, over the chains from data
            and those from noise together (Vehtari et al. 2021).
        ess_bulk, ess_tail: effective sample sizes of the same draws.
        reason: the sentence that the verdict rests on.
        acceptance: the share of all steps that a Metropolis test accepted, of adjusted chains.
    """

    verdict: str
    until: int
    drift: float
    saturation: float
    rhat: float
    ess_bulk: float
    ess_tail: float
    reason: str
    acceptance: float | None = None


def long_runs(
    energy: Energy,
    images: Tensor,
    settings: LangevinSettings,
    *,
    data_noise: float = 0.0,
    kept: int = 9,
    seed: int = 0,
    precision: str = "fp32",
) -> Chains:
    """Run chains of `settings.steps` steps from images and as many from uniform noise.

    Args:
        energy: maps `[b, C, H, W]` in [-1, 1] to `[b]`.
        images: `[b, C, H, W]` in [-1, 1], the test set's for instance.
        settings: step size, temperature, and how long the chains run, 1 or more.
        data_noise: standard deviation of the noise on data in learning, in [-1, 1] units.
        kept: how many steps' images are kept, spaced by a constant factor, 2 or more.
        seed: seed of the starts and the chains.
        precision: of the chains, as in `run_chain`.

    Raises:
        UsageError: no images, or fewer steps than that many can be kept of.
    """
    if not len(images) or settings.steps < 1 or kept < 2:
        raise UsageError("convergence needs images, 1 step or more, and 2 steps kept or more.")
    steps = tuple(sorted({0, *np.geomspace(1, settings.steps, kept).round().astype(int).tolist()}))
    runs = {
        start: _run(energy, x, settings, steps, seed, start, precision)
        for start, x in _starts(images, data_noise, seed).items()
    }
    fresh = images + data_noise * _noise(seed, "fresh data", images)
    with torch.no_grad():
        reference = energy(fresh).float().cpu()
    (data, data_energy, taken), (noise, noise_energy, too) = runs["data"], runs["noise"]
    return Chains(
        steps=steps,
        data=data,
        noise=noise,
        data_energy=data_energy,
        noise_energy=noise_energy,
        reference=reference,
        acceptance=None if taken is None or too is None else (taken + too) / 2,
    )


@torch.no_grad()
def kept_classes(
    classify: Callable[[Tensor], Tensor], chains: Chains, images: Tensor
) -> list[float]:
    """Return the share of chains from data that still have their image's class, at each kept step.

    Args:
        classify: maps images `[b, C, H, W]` in [0, 1] to logits; what it says of an image itself is
            its class.
        chains: from `long_runs`.
        images: where their chains from data began, `[b, C, H, W]` in [0, 1].
    """
    classes = classify(images).argmax(-1)
    states = [((x.to(images) + 1.0) / 2.0).clamp(0.0, 1.0) for x in chains.data]
    return [float((classify(x).argmax(-1) == classes).float().mean()) for x in states]


def _starts(images: Tensor, data_noise: float, seed: int) -> dict[str, Tensor]:
    keys = _keys(seed, "noise starts", len(images)).to(images.device)
    uniform = KeyedNoise(keys).uniform(0, images) * 2.0 - 1.0
    return {"data": images + data_noise * _noise(seed, "data starts", images), "noise": uniform}


def _noise(seed: int, purpose: str, like: Tensor) -> Tensor:
    return KeyedNoise(_keys(seed, purpose, len(like)).to(like.device)).normal(0, like)


def _keys(seed: int, purpose: str, count: int) -> Tensor:
    return chain_keys(seed, purpose, range(count), range(1))[0]


def _run(
    energy: Energy,
    x: Tensor,
    settings: LangevinSettings,
    steps: Sequence[int],
    seed: int,
    start: str,
    precision: str,
) -> tuple[Tensor, Tensor, float | None]:
    trace, keys = Trace(), _keys(seed, f"chains from {start}", len(x)).to(x.device)
    run_chain(
        x,
        KeyedNoise(keys),
        energy=energy,
        settings=settings,
        precision=precision,
        trace=trace,
        snapshots=steps,
    )
    images = torch.stack([trace.snapshots[k] for k in steps]).cpu()
    return images, torch.stack(trace.energy, dim=1).cpu(), trace.acceptance


def judge_convergence(chains: Chains, *, learned_steps: int) -> Convergence:
    """Return what long chains say of their energy.

    Convergent: after `TIMES` times the steps of learning, the energies of chains from data still
    agree with the data's, no pixel has run away, and chains from noise cannot be told from them.
    Metastable: chains from data stay where the data is for at least as long as in learning, but
    leave it later or never meet those from noise. Else not convergent.

    Args:
        chains: from `long_runs`.
        learned_steps: how long a chain lives in learning, K/p steps, 1 or more.

    Raises:
        UsageError: arviz-stats is not installed, or the chains are shorter than those of learning.
    """
    length = chains.data_energy.shape[1]
    if not 1 <= learned_steps <= length:
        raise UsageError(
            f"chains of {length} steps say nothing of learning with chains of {learned_steps}; "
            f"run them for {TIMES * learned_steps} steps or more."
        )
    until, drift = _stay(chains)
    saturation = _saturation(chains.data[-1], chains.data[0])
    rhat, bulk, tail = mixing(torch.cat([chains.data_energy, chains.noise_energy]))
    verdict, reason = _verdict(
        until=until,
        drift=drift,
        saturation=saturation,
        rhat=rhat,
        length=length,
        learned_steps=learned_steps,
    )
    return Convergence(
        verdict=verdict,
        until=until,
        drift=drift,
        saturation=saturation,
        rhat=rhat,
        ess_bulk=bulk,
        ess_tail=tail,
        reason=reason,
        acceptance=chains.acceptance,
    )


def _verdict(
    *,
    until: int,
    drift: float,
    saturation: float,
    rhat: float,
    length: int,
    learned_steps: int,
) -> tuple[str, str]:
    if saturation > SATURATION_LIMIT and until < learned_steps:
        return NOT_CONVERGENT, f"{saturation:.0%} of the chains' pixels have run out of range."
    if until < learned_steps:
        return (
            NOT_CONVERGENT,
            f"chains from data leave its energies at step {until}, before the {learned_steps} "
            "steps that chains live in learning.",
        )
    if until < length or abs(drift) > DRIFT_LIMIT or saturation > SATURATION_LIMIT:
        return METASTABLE, f"chains from data keep its energies until about step {until}."
    if length < TIMES * learned_steps:
        return (
            METASTABLE,
            f"chains from data keep its energies, but for {length} steps only, less than {TIMES} "
            f"times the {learned_steps} of learning.",
        )
    if not rhat < RHAT_LIMIT:
        return (
            METASTABLE,
            f"chains from data keep its energies, but those from noise do not mix with them "
            f"(R-hat {rhat:.2f}).",
        )
    return CONVERGENT, f"after {length} steps chains from data and from noise have its energies."


def _stay(chains: Chains) -> tuple[int, float]:
    """Return the last step at which chains from data have its energies, and how far they end."""
    centre, spread = chains.reference.mean(), chains.reference.std().clamp_min(1e-12)
    means = (chains.data_energy.mean(0) - centre) / spread
    # Chains move from step to step; a tenth of what has passed is what counts as having left.
    smooth = torch.stack([means[k - max(1, k // 10) : k].mean() for k in _checks(len(means))])
    away = ~(smooth.abs() <= DRIFT_LIMIT)
    until = _checks(len(means))[int(away.nonzero()[0, 0])] if bool(away.any()) else len(means)
    return until, float(smooth[-1])


def _checks(length: int) -> list[int]:
    return sorted({int(k) for k in np.geomspace(1, length, 60).round()})


def _saturation(ends: Tensor, data: Tensor) -> float:
    """Return the share of pixels `[b, C, H, W]` far beyond what the data's reach."""
    reach = BEYOND * float(data.abs().max())
    return float((~(ends.abs() <= reach)).float().mean())


def mixing(energies: Tensor) -> tuple[float, float, float]:
    """Return rank-normalised split R-hat, bulk and tail effective sample size of a second half.

    Args:
        energies: one scalar a chain and step, `[chains, steps]`, steps 8 or more.

    Raises:
        UsageError: arviz-stats is not installed.
    """
    stats = optional("arviz_stats.base", "arviz-stats", "diagnostics").array_stats
    draws = np.asarray(energies[:, energies.shape[1] // 2 :].double())
    axes = {"chain_axis": 0, "draw_axis": 1}
    if not np.isfinite(draws).all():
        return float("inf"), 0.0, 0.0
    bulk = stats.ess(draws, method="bulk", **axes)
    tail = stats.ess(draws, method="tail", prob=(0.05, 0.95), **axes)
    return float(stats.rhat(draws, **axes)), float(bulk), float(tail)
