"""Whether chains in a faster precision purify as fp32 ones do: shown once, then looked up.

Not being able to tell two precisions apart is no proof that they are alike. So each finding states
the margin that was shown: the smallest at which two one-sided tests at 5% (Schuirmann 1987, TOST)
both reject "the difference is larger", which is |mean| + 1.645 standard errors of the paired
differences. Chains of both precisions start alike and feel the same noise.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from ebm_defense.engine import Energy, choose_engine
from ebm_defense.langevin import LangevinSettings, run_chain
from ebm_defense.noise import KeyedNoise, chain_keys
from ebm_defense.precision.findings import key_of, located, look_up, say_unknown, say_used
from ebm_defense.precision.names import resolve_precision

CHAIN_STEPS = {"cpu": 12_800, "cuda": 6_500_000}
"""Chain-steps of a check in each precision: seconds of a CPU core, a minute of a GPU."""
ENOUGH, FEWEST, AT_ONCE = 4096, 64, 1024
"""Chains of a check at most, and at least for one that nobody asked for. Long chains of two
precisions part for good, and their differences then spread as their energies do: the margin that n
of them show is 1.645·√(2/n) standard deviations at best, 0.04 at 4,096 and 0.29 at 64."""
REFEREED, REFEREED_STEPS = 4, 20
SMALL = 20_000
"""Energies of fewer parameters gain nothing from bf16 and are left in fp32, unchecked."""
QUANTILE = 1.645


@dataclass(frozen=True, kw_only=True)
class Margins:
    """The largest differences between purified images that count as none.

    Attributes:
        energy: of the mean energy, in standard deviations of the energy over images.
        mean: of the mean pixel, in [0, 1] units.
        spread: of the root mean square distance that a chain moved, as a ratio less one.
        accuracy: of the share classified correctly.
    """

    energy: float = 0.1
    mean: float = 0.5 / 255
    spread: float = 0.02
    accuracy: float = 0.01


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What a check showed; each margin is in the units of `Margins`.

    Attributes:
        equivalent: whether every margin shown is within the one allowed.
        steps: length of the chains; shorter ones are covered.
        chains: how many pairs.
        energy, mean, spread: the margins shown, energies computed in float64.
        accuracy: likewise, where a classifier was at hand.
        referee_fp32, referee_fast: root mean square pixel distance, in [0, 1] units, to a few
            float64 chains of at most 20 steps.
    """

    equivalent: bool
    steps: int
    chains: int
    energy: float
    mean: float
    spread: float
    accuracy: float | None = None
    referee_fp32: float = 0.0
    referee_fast: float = 0.0


def allowed_precision(energy: Energy, images: Tensor, settings: LangevinSettings) -> str:
    """Return the fastest precision that a finding shows to purify as fp32 does: "bf16", on a GPU
    else "tf32", or "fp32".

    The finding is one of the package or one that `ebm-defense precision` kept; without one nothing
    is tried. Which it is, is logged once.

    Args:
        energy: the energy.
        images: `[b, C, H, W]` in [0, 1], such as those to be purified.
        settings: of the chain.
    """
    if images.dtype == torch.float64:
        return "fp64"
    if settings.steps and len(images) and _worth_it(energy):
        assert isinstance(energy, nn.Module)
        for precision in faster_precisions(images.device):
            key = finding_key(energy, images, settings, precision)
            where = _shown(key, settings.steps)
            if where is not None:
                say_used(f"chains of {settings.steps} steps run in {precision}", where)
                return precision
            say_unknown(precision, settings.steps)
    return "fp32"


def faster_precisions(device: torch.device) -> list[str]:
    """Return what a device multiplies faster than fp32, the fastest first."""
    found = [resolve_precision(p, device, torch.float32) for p in ("fastest", "tf32")]
    return [p for p in dict.fromkeys(found) if p != "fp32"]


def _shown(key: str, steps: int) -> str | None:
    """Return where the finding is that allows chains of this length, if there is one."""
    covering = ((f, where) for f, where in located(key, Finding) if f.steps >= steps)
    found, where = next(covering, (None, None))
    return where if found is not None and found.equivalent else None


def affordable(device: torch.device, settings: LangevinSettings) -> int:
    """Return how many chains a check of these settings takes if nobody says how many."""
    steps = CHAIN_STEPS.get(device.type, CHAIN_STEPS["cpu"])
    return min(ENOUGH, steps // max(settings.steps, 1))


def _worth_it(energy: Energy) -> bool:
    if not isinstance(energy, nn.Module):
        return False
    return sum(p.numel() for p in energy.parameters()) >= SMALL


def finding_key(
    energy: nn.Module, images: Tensor, settings: LangevinSettings, precision: str = "bf16"
) -> str:
    """Return what a finding is about: weights, network, chain, engine and kind of device."""
    chain = [settings.step_size, settings.temperature]
    about: dict[str, object] = {"chain": chain, "engine": choose_engine(energy, images, precision)}
    if precision != "bf16":  # which the keys that ship do not name
        about["precision"] = precision
    return key_of(energy, images.device, **about)


def known_finding(key: str, steps: int) -> Finding | None:
    """Return a finding of the package or the cache that covers chains of this length."""
    return next((f for f in look_up(key, Finding) if f.steps >= steps), None)


def check(
    energy: nn.Module,
    images: Tensor,
    settings: LangevinSettings,
    *,
    precision: str = "bf16",
    chains: int | None = None,
    margins: Margins | None = None,
    classify: Callable[[Tensor], Tensor] | None = None,
    labels: Tensor | None = None,
) -> Finding:
    """Compare chains in a faster precision with fp32 chains of the same noise.

    Args:
        energy: the energy.
        images: where chains start, `[b, C, H, W]` in [0, 1], repeated until there are enough.
        settings: of the chains.
        precision: the faster one.
        chains: how many; by default as many as `CHAIN_STEPS` allow, at most `ENOUGH` and at least
            `FEWEST`.
        margins: what counts as no difference.
        classify: maps purified images to logits, to compare accuracies too.
        labels: `[b]`, with `classify`.
    """
    chains = chains or max(FEWEST, affordable(images.device, settings))
    rows = torch.arange(chains, device=images.device) % len(images)
    starts = images[rows].float()
    ends = {p: _purified(energy, starts, settings, p) for p in ("fp32", precision)}
    shown = _margins_shown(energy, starts, ends["fp32"], ends[precision])
    if classify is not None and labels is not None:
        right = {p: _right(classify, x, labels[rows]) for p, x in ends.items()}
        shown["accuracy"] = share_margin(right[precision] - right["fp32"])
    allowed = asdict(margins or Margins())
    return Finding(
        equivalent=all(value <= allowed[name] for name, value in shown.items()),
        steps=settings.steps,
        chains=chains,
        **shown,
        **_referee(energy, starts[:REFEREED], settings, precision),
    )


def _purified(
    energy: nn.Module, images: Tensor, settings: LangevinSettings, precision: str
) -> Tensor:
    keys = chain_keys(0, "precision", range(len(images)), range(1))[0].to(images.device)
    starts = (images * 2.0 - 1.0).split(AT_ONCE)
    ends = [
        run_chain(x, KeyedNoise(k), energy=energy, settings=settings, precision=precision)
        for x, k in zip(starts, keys.split(AT_ONCE), strict=True)
    ]
    return (torch.cat(ends) + 1.0) / 2.0


def _margins_shown(
    energy: nn.Module, starts: Tensor, exact: Tensor, fast: Tensor
) -> dict[str, float]:
    u_exact, u_fast = (_energies(energy, x) for x in (exact, fast))
    moved_exact, moved_fast = (
        (x - starts).double().flatten(1).norm(dim=1).clamp_min(1e-12) for x in (exact, fast)
    )
    return {
        "energy": margin_shown((u_fast - u_exact) / u_exact.std().clamp_min(1e-12)),
        "mean": margin_shown((fast - exact).double().flatten(1).mean(1)),
        "spread": margin_shown((moved_fast / moved_exact).log()),
    }


def margin_shown(differences: Tensor) -> float:
    """Return the smallest margin that TOST at 5% shows for the mean of these differences `[n]`."""
    error = differences.std() / len(differences) ** 0.5
    return float(differences.mean().abs() + QUANTILE * error)


def share_margin(differences: Tensor) -> float:
    """Return the margin that is shown for a difference of shares, of −1, 0 or 1 an image `[n]`."""
    # One discordant pair more than were seen, or none at all would show a margin of 0.
    n, mean = len(differences), float(differences.mean())
    variance = (float(differences.abs().sum()) + 1.0) / n - mean**2
    return abs(mean) + QUANTILE * (variance / n) ** 0.5


@torch.no_grad()
def _right(classify: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> Tensor:
    parts = zip(images.split(400), labels.split(400), strict=True)
    return torch.cat([(classify(x).argmax(-1) == y).double() for x, y in parts])


@torch.no_grad()
def _energies(energy: nn.Module, images: Tensor) -> Tensor:
    exact = _in_double(energy)
    return torch.cat([exact(x.double() * 2.0 - 1.0) for x in images.split(64)])


def _in_double(energy: nn.Module) -> nn.Module:
    return copy.deepcopy(energy).double()


def _referee(
    energy: nn.Module, images: Tensor, settings: LangevinSettings, precision: str
) -> dict[str, float]:
    few = LangevinSettings(
        steps=min(settings.steps, REFEREED_STEPS),
        step_size=settings.step_size,
        temperature=settings.temperature,
    )
    truth = _purified(_in_double(energy), images.double(), few, "fp32")
    precisions = {"fp32": "fp32", "fast": precision}
    ends = {name: _purified(energy, images, few, p) for name, p in precisions.items()}
    return {f"referee_{p}": float((x - truth).square().mean().sqrt()) for p, x in ends.items()}
