"""Is a defense robust, or does it only hide its gradient? Checks with a verdict each.

What Athalye, Carlini, Wagner (2018) and Carlini et al. (2019) tell every evaluation to look at. A
defense that fails one may still be robust, but the number measured for it is not to be believed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ebm_defense.attacks import PGD, CrossEntropy, Square, ThreatModel
from ebm_defense.attacks.gradients.base import Gradient, GradientEstimate
from ebm_defense.attacks.losses import Loss
from ebm_defense.defense import PurifiedClassifier
from ebm_defense.errors import UsageError
from ebm_defense.eval.judging.statistics import share
from ebm_defense.eval.purification_curve import purification_curve
from ebm_defense.interface.images import check_images, check_labels
from ebm_defense.interface.numbers import plain_numbers
from ebm_defense.noise import KeyedNoise, chain_keys
from ebm_defense.purifiers import SteppedPurifier

DISTANCES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Where the loss surface is looked at, in units of eps."""


@dataclass(frozen=True, kw_only=True)
class AuditSettings:
    """What an audit spends.

    Attributes:
        threat: norm and eps.
        steps: of each attack by gradient.
        replicates: attack replicates of a step.
        many: those of the attack that averages more noise away.
        draws: fresh replicates that judge.
        larger: multiples of eps, rising, at the last of which accuracy must have reached chance.
        queries: of Square, on the mean logits of the replicates.
        tries: random perturbations an image, of which the worst counts.
        seed: seed of every stream.
    """

    threat: ThreatModel
    steps: int = 20
    replicates: int = 4
    many: int = 64
    draws: int = 32
    larger: tuple[float, ...] = (2.0, 3.0, 5.0)
    queries: int = 200
    tries: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        plain_numbers(self)
        numbers = (self.steps, self.replicates, self.many, self.draws, self.queries, self.tries)
        if min(numbers) < 1:
            raise UsageError("an audit's steps, replicates, draws and tries must be at least 1.")
        if not self.larger or sorted(self.larger) != list(self.larger) or self.larger[0] <= 1:
            raise UsageError(f"larger multiples of eps rise from above 1, not {self.larger}.")


class Check(NamedTuple):
    """One line of an audit: what was asked, what was found, and whether it is as it should be."""

    name: str
    found: str
    passed: bool


class Audited(NamedTuple):
    """What an audit measured, before any verdict; accuracies `[N]` are of each image, bool.

    Attributes:
        clean: without an attack.
        plain: under PGD through the chain, on fresh noise at every step.
        frozen: under PGD that meets the same noise at every step, judged on fresh noise.
        many: under PGD that averages many replicates.
        random: under the worst of some random perturbations.
        transfer: under PGD made on another model; None without one.
        square: under Square.
        larger: accuracy under PGD at each multiple of eps.
        along_gradient, along_random: mean loss at each of `DISTANCES`.
        compression: by number of steps K, along the attack and along random perturbations.
        chance: accuracy of guessing.
    """

    clean: Tensor
    plain: Tensor
    frozen: Tensor
    many: Tensor
    random: Tensor
    transfer: Tensor | None
    square: Tensor
    larger: dict[float, float]
    along_gradient: list[float]
    along_random: list[float]
    compression: list[tuple[int, float, float]]
    chance: float


@dataclass(frozen=True)
class FrozenNoise:
    """A gradient through one noise for all steps and images."""

    inner: Gradient
    seed: int

    @property
    def name(self) -> str:
        return f"{self.inner.name}, frozen noise"

    @property
    def through_chain(self) -> bool:
        return self.inner.through_chain

    @property
    def own_curvature(self) -> bool:
        return self.inner.own_curvature

    def chain_steps(self, defense: PurifiedClassifier, replicates: int = 1) -> int:
        return self.inner.chain_steps(defense, replicates)

    def __call__(
        self,
        defense: PurifiedClassifier,
        images: Tensor,
        labels: Tensor,
        keys: Tensor,
        loss: Loss,
    ) -> GradientEstimate:
        one = chain_keys(self.seed, "frozen", [0], range(len(keys)))
        same = one.expand(len(keys), len(images)).to(keys)
        return self.inner(defense, images, labels, same, loss)


def audit(
    defense: PurifiedClassifier,
    images: Tensor,
    labels: Tensor,
    gradient: Gradient,
    settings: AuditSettings,
    other: PurifiedClassifier | None = None,
) -> Audited:
    """Attack a defense in every way that tells masking from robustness.

    Args:
        defense: what is audited.
        images: `[N, C, H, W]` in [0, 1].
        labels: true classes `[N]`.
        gradient: the strongest that fits the defense.
        settings: what it may spend.
        other: the model from which attacks transfer; none if not given.
    """
    check_images(images)
    check_labels(labels, images)
    s, subject = settings, _Subject(defense, images, labels, settings)
    plain = subject.attack(gradient)
    surface = subject.surface(gradient, plain)
    return Audited(
        clean=subject.stands(images),
        plain=subject.stands(plain),
        frozen=subject.stands(subject.attack(FrozenNoise(gradient, s.seed))),
        many=subject.stands(subject.attack(gradient, replicates=s.many)),
        random=subject.under_random(),
        transfer=None if other is None else subject.stands(subject.attack(gradient, on=other)),
        square=subject.stands(subject.square()),
        larger={
            m: float(subject.stands(subject.attack(gradient, scale=m)).double().mean())
            for m in s.larger
        },
        along_gradient=surface[0],
        along_random=surface[1],
        compression=_compression(subject, plain),
        chance=float(labels.bincount().max()) / len(labels),
    )


class _Subject:
    """A defense, the images it is audited on, and the judge's draws."""

    def __init__(
        self, defense: PurifiedClassifier, images: Tensor, labels: Tensor, settings: AuditSettings
    ) -> None:
        self.defense, self.images, self.labels, self.settings = defense, images, labels, settings

    def attack(
        self,
        gradient: Gradient,
        *,
        replicates: int | None = None,
        scale: float = 1.0,
        on: PurifiedClassifier | None = None,
    ) -> Tensor:
        """Return the images that PGD ends with, made on `on` or on the defense itself."""
        s = self.settings
        threat = replace(s.threat, eps=min(s.threat.eps * scale, 1.0))
        pgd = PGD(
            threat=threat,
            steps=s.steps,
            step_size=threat.eps / 4,
            replicates=replicates or s.replicates,
            gradient=gradient,
        )
        return pgd(on or self.defense, self.images, self.labels, seed=s.seed)

    def square(self) -> Tensor:
        s = self.settings
        search = Square(threat=s.threat, steps=s.queries, replicates=s.replicates, rescale=True)
        return search(self.defense, self.images, self.labels, seed=s.seed)

    def logits(self, images: Tensor, purpose: str = "audit") -> Tensor:
        """Return the judge's mean logits `[N, classes]`."""
        draws = range(self.settings.draws if self.defense.stochastic else 1)
        keys = chain_keys(self.settings.seed, purpose, range(len(images)), draws)
        return self.defense.combine(self.defense.verdict_logits(images, keys))

    def stands(self, images: Tensor, purpose: str = "audit") -> Tensor:
        """Return which images are classified rightly, bool `[N]`."""
        return self.logits(images, purpose).argmax(-1) == self.labels

    def noise(self, purpose: str) -> KeyedNoise:
        keys = chain_keys(self.settings.seed, purpose, range(len(self.images)), range(1))[0]
        return KeyedNoise(keys.to(self.images.device))

    def under_random(self) -> Tensor:
        """Return which images stand under every one of some random perturbations of full size."""
        kept = torch.ones_like(self.labels, dtype=torch.bool)
        for i in range(self.settings.tries):
            direction = self.noise(f"random {i}").normal(0, self.images)
            x = self.settings.threat.step(
                self.images, self.images, direction, self.settings.threat.eps
            )
            kept &= self.stands(x, f"audit random {i}")
        return kept

    def surface(self, gradient: Gradient, attacked: Tensor) -> tuple[list[float], list[float]]:
        """Return mean losses on the way to the attacked images, and as far at random."""
        direction = self.noise("surface").normal(0, self.images)
        eps = self.settings.threat.eps
        wandered = self.settings.threat.step(self.images, self.images, direction, eps)
        ends = (attacked, wandered)
        along = ([self._loss(end, d) for d in DISTANCES] for end in ends)
        return next(along), next(along)

    def _loss(self, end: Tensor, distance: float) -> float:
        logits = self.logits(self.images + distance * (end - self.images), "surface")
        return float(CrossEntropy()(logits[None], self.labels).mean())


def _compression(subject: _Subject, attacked: Tensor) -> list[tuple[int, float, float]]:
    """Return ‖P(x+δ; ω) − P(x; ω)‖/‖δ‖ by K, for δ of the attack and δ at random."""
    purifier = subject.defense.purifier
    if not isinstance(purifier, SteppedPurifier):
        return []
    lengths = sorted({*range(min(purifier.chain_steps, 10) + 1), purifier.chain_steps})
    direction = subject.noise("compression").normal(0, subject.images)
    threat = subject.settings.threat
    wandered = threat.step(subject.images, subject.images, direction, threat.eps)
    points = purification_curve(
        purifier, subject.defense.classifier, subject.images, attacked, subject.labels,
        lengths=lengths, wandered=wandered, seed=subject.settings.seed,
    )  # fmt: skip
    return [(p.steps, p.compression, p.at_random) for p in points]


def verdicts(found: Audited) -> list[Check]:
    """Return a verdict on each thing that was measured.

    An accuracy counts as not lower than another where the difference on the same images is within
    two standard errors.
    """
    return list(_verdicts(found))


def _verdicts(a: Audited) -> Iterator[Check]:
    yield Check(
        "frozen noise: attacking one noise is no stronger than fresh noise",
        f"{_said(a.frozen)}, fresh {_said(a.plain)}",
        _not_below(a.frozen, a.plain),
    )
    yield Check(
        "EOT: averaging many more replicates is no stronger",
        f"{_said(a.many)}, few {_said(a.plain)}",
        _not_below(a.many, a.plain),
    )
    sizes = ", ".join(f"{v:.1%} at {m:g} eps" for m, v in a.larger.items())
    yield Check(
        "larger eps: accuracy falls to chance",
        f"{sizes}; chance {a.chance:.1%}",
        min(a.larger.values()) <= a.chance,
    )
    for name, rival in (("random", a.random), ("transfer", a.transfer), ("Square", a.square)):
        if rival is not None:
            yield Check(
                f"{name}: weaker than the attack by gradient",
                f"{_said(rival)}, by gradient {_said(a.plain)}",
                _not_below(rival, a.plain),
            )
    rises = all(x <= y for x, y in zip(a.along_gradient, a.along_gradient[1:], strict=False))
    yield Check(
        "loss surface: rises steadily to the attack, and further than at random",
        f"to the attack {_curve(a.along_gradient)}; at random {_curve(a.along_random)}",
        rises and a.along_gradient[-1] > a.along_random[-1],
    )


def _not_below(first: Tensor, second: Tensor) -> bool:
    """Whether the first accuracy is not below the second by more than two standard errors."""
    difference = first.double() - second.double()
    error = float(difference.std()) / len(difference) ** 0.5 if len(difference) > 1 else 0.0
    return float(difference.mean()) >= -2.0 * error


def _said(stands: Tensor) -> str:
    found = share(int(stands.sum()), len(stands))
    return f"{found.value:.1%} ({found.low:.1%} to {found.high:.1%})"


def _curve(losses: list[float]) -> str:
    return " ".join(f"{v:.3f}" for v in losses)
