"""What flags need to know of a model beyond its records: a few queries of a few images."""

from __future__ import annotations

import dataclasses
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

import tomli_w
import torch
from torch import Tensor

from ebm_defense.attacks import PGD, CrossEntropy, ThreatModel
from ebm_defense.attacks.base import Attack, attack_replicates
from ebm_defense.attacks.gradients.base import Gradient
from ebm_defense.defense import PurifiedClassifier
from ebm_defense.errors import UsageError
from ebm_defense.eval.judging.judge import Stream, draw_logits
from ebm_defense.noise import KeyedNoise, chain_keys, derive_seed
from ebm_defense.storage.files import write_text

FILE = "measures.toml"
MOST_IMAGES, SHARE = 4, 8
"""At most so many images, and at most one in so many of the run's, so that checking stays cheap."""
UNBOUNDED = {"steps": 8, "step_size": 0.25, "random_start": False}
"""From the image itself: a random start in the whole box would be noise, which proves nothing."""
UNBOUNDED_REPLICATES, JUDGED = 4, 8


@dataclass(frozen=True, kw_only=True)
class Slope:
    """What a gradient of the cross-entropy looks like at randomly started images.

    Attributes:
        images: how many were queried.
        zero, broken: on how many it is 0 everywhere, or NaN or infinite somewhere.
        cosine: mean cosine of two independent EOT gradients of `replicates` each.
        replicates: the least that an attack of the protocol uses with this gradient.
        drift: largest difference of the logits of such a query and of one without a gradient, with
            the same noise, in standard deviations of the logits.
        unbounded_left: images that stand after PGD with this gradient and no bound on eps.
    """

    images: int
    zero: int
    broken: int
    cosine: float
    replicates: int
    drift: float
    unbounded_left: int


@dataclass(frozen=True, kw_only=True)
class SanityChecks:
    """What a few queries of a model showed.

    Attributes:
        stochastic: whether two passes differ.
        probabilities: whether its outputs are nonnegative and sum to 1.
        classes: how many there are.
        replay: largest difference of two passes with the same noise, in standard deviations.
        curvature: largest entry of a Hessian-vector product of the energy; None without one.
        slopes: by the name of the gradient.
    """

    stochastic: bool
    probabilities: bool
    classes: int
    replay: float
    curvature: float | None
    slopes: dict[str, Slope] = field(default_factory=dict)


def save_sanity_checks(folder: Path, sanity_checks: SanityChecks) -> None:
    """Write sanity checks into a run folder, so that flags can be raised without the model."""
    plain = {k: v for k, v in dataclasses.asdict(sanity_checks).items() if v is not None}
    write_text(folder / FILE, tomli_w.dumps(plain))


def load_sanity_checks(folder: Path) -> SanityChecks | None:
    """Read a run folder's sanity checks; None where it has none.

    Raises:
        UsageError: the file is damaged.
    """
    if not (folder / FILE).exists():
        return None
    try:
        plain = tomllib.loads((folder / FILE).read_text(encoding="utf-8-sig"))
        slopes = {name: Slope(**slope) for name, slope in plain.pop("slopes", {}).items()}
        return SanityChecks(**({"curvature": None} | plain), slopes=slopes)
    except (tomllib.TOMLDecodeError, TypeError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{folder / FILE} is damaged ({error}); delete it and repeat the run's command."
        ) from error


def run_sanity_checks(
    defense: PurifiedClassifier,
    images: Tensor,
    labels: Tensor,
    attacks: tuple[Attack, ...],
    seed: int,
) -> SanityChecks:
    """Query the first of a run's images; the same seed finds the same.

    Args:
        defense: what is evaluated, past `check_model`.
        images: `[N, C, H, W]` in [0, 1], at least one.
        labels: true classes `[N]`.
        attacks: the protocol's.
        seed: the run's.
    """
    few = max(1, min(MOST_IMAGES, len(images) // SHARE))
    images, labels, seed = images[:few], labels[:few], derive_seed(seed, "flags")
    keys = chain_keys(seed, "replay", range(few), attack_replicates(2, defense))
    with torch.no_grad():
        first, again = (defense.replicate_logits(images, keys) for _ in range(2))
    return SanityChecks(
        stochastic=defense.stochastic,
        probabilities=_probabilities(first),
        classes=first.shape[-1],
        replay=_gap(first, again),
        curvature=curvature(defense, images, seed),
        slopes=_slopes(defense, images, labels, attacks, seed),
    )


def _probabilities(logits: Tensor) -> bool:
    sums = logits.sum(-1)
    return bool((logits >= 0).all() and torch.allclose(sums, torch.ones_like(sums), atol=1e-4))


def _gap(first: Tensor, second: Tensor) -> float:
    spread = first.std().clamp_min(torch.finfo(first.dtype).tiny)
    return float((first - second).abs().max() / spread)


def curvature(defense: PurifiedClassifier, images: Tensor, seed: int) -> float | None:
    """Return the largest entry of ∇²U(x)·v for a random v; None where there is no energy."""
    keys = chain_keys(seed, "direction", range(len(images)), range(1))[0]
    direction = KeyedNoise(keys.to(images.device)).normal(0, images)
    product = defense.purifier.curvature(images, direction)
    return None if product is None else float(product.abs().max())


def _slopes(
    defense: PurifiedClassifier,
    images: Tensor,
    labels: Tensor,
    attacks: tuple[Attack, ...],
    seed: int,
) -> dict[str, Slope]:
    """Measure each gradient that the attacks use once, at the fewest replicates in use."""
    found: dict[str, Slope] = {}
    for attack in sorted(attacks, key=lambda a: a.replicates):
        gradient: Gradient | None = getattr(attack, "gradient", None)
        if gradient is not None and gradient.name not in found:
            try:
                inspector = _Inspector(defense, images, labels, attack, gradient, seed)
                found[gradient.name] = inspector.slope()
            except UsageError:
                # The attack itself has said, or will say, why it cannot take this gradient.
                continue
    return found


class _Inspector:
    """Queries randomly started images through one gradient."""

    def __init__(
        self,
        defense: PurifiedClassifier,
        images: Tensor,
        labels: Tensor,
        attack: Attack,
        gradient: Gradient,
        seed: int,
    ) -> None:
        self.defense, self.images, self.labels = defense, images, labels
        self.attack, self.gradient, self.seed = attack, gradient, seed
        keys = chain_keys(seed, "start", range(len(images)), range(1))[0]
        self.start = attack.threat.random_start(images, KeyedNoise(keys.to(images.device)))

    def slope(self) -> Slope:
        (first, drift), (second, _) = self._query("first"), self._query("second")
        broken = int((~first.isfinite()).any(1).sum())
        return Slope(
            images=len(first),
            zero=int((first == 0).all(1).sum()),
            broken=broken,
            cosine=float(torch.cosine_similarity(first, second, dim=1).mean()),
            replicates=self.attack.replicates,
            drift=drift,
            # An attack that is told no numbers proves nothing.
            unbounded_left=0 if broken else self._unbounded(),
        )

    def _query(self, purpose: str) -> tuple[Tensor, float]:
        ids, draws = (
            range(len(self.images)),
            attack_replicates(self.attack.replicates, self.defense),
        )
        keys = chain_keys(self.seed, f"{purpose} {self.gradient.name}", ids, draws)
        estimate = self.gradient(self.defense, self.start, self.labels, keys, CrossEntropy())
        with torch.no_grad():
            plain = self.defense.replicate_logits(self.start, keys)
        return estimate.gradient.flatten(1).cpu().double(), _gap(plain, estimate.logits)

    def _unbounded(self) -> int:
        attack = PGD(
            threat=ThreatModel(eps=1.0),
            replicates=min(UNBOUNDED_REPLICATES, self.attack.replicates),
            gradient=self.gradient,
            **UNBOUNDED,  # type: ignore[arg-type]
        )
        # `run`, not a call: what this attack cannot attack was refused before.
        ids = range(len(self.images))
        x = attack.run(self.defense, self.images, self.labels, ids=ids, seed=self.seed)
        stream = Stream(self.seed, "unbounded", JUDGED)
        logits = draw_logits(self.defense, x, range(len(x)), stream)
        return int((self.defense.combine(logits).argmax(-1) == self.labels).sum())
