"""Is this image broken? Decided on fresh draws, whatever the attack believes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ebm_defense.attacks.base import Proposal, attack_replicates, cost
from ebm_defense.attacks.session import refuse_nan
from ebm_defense.attacks.threat import ThreatModel
from ebm_defense.defense import PurifiedClassifier, as_defense
from ebm_defense.errors import UsageError
from ebm_defense.eval.judging.check_model import check_model
from ebm_defense.eval.judging.rules import Rule, Ruling, TwoStage
from ebm_defense.images import check_images
from ebm_defense.inputs import read_batch, read_images
from ebm_defense.modes import evaluating
from ebm_defense.noise import chain_keys
from ebm_defense.numbers import whole

STANDS = -1
Count = Callable[[int], None]
"""Hears how many chain-steps were just spent."""


def uncounted(steps: int) -> None:
    """Hear of chain-steps that are counted elsewhere, or by nobody."""


class Stream(NamedTuple):
    """Fresh draws for one purpose: as many replicates as named, where the defense is random,
    from the one of number `first` on.
    """

    seed: int
    purpose: str
    replicates: int
    hear: Count = uncounted
    first: int = 0


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the judge found of each image, all `[b]` but `images`.

    Attributes:
        stands: whether the defense still classifies it correctly.
        broken_at: the attack step that broke it; −1 where it stands.
        votes: share of the judge's last draws on it that were right; NaN where it never drew.
        draws: how many those were.
        undecided: whether the judge's rule could not be sure, and its word is a majority's.
        images: `[b, C, H, W]`: the image that broke it, or the last one proposed.
        seen: of the attack's own draws on that image, how many were right, and of how many,
            `[2, b]`.
        blind: on how many of the attack's looks its gradient was NaN or infinite.
    """

    stands: Tensor
    broken_at: Tensor
    votes: Tensor
    draws: Tensor
    undecided: Tensor
    images: Tensor
    seen: Tensor
    blind: Tensor


class Judge:
    """Judges what an attack proposes, on streams the attack never saw.

    A proposal that the rule suspects, while its image still stands, is drawn afresh, at most
    `replicates` times; if the rule then finds it wrong, the image is broken for good.

    Args:
        defense: what is judged.
        originals: `[b, C, H, W]` in [0, 1].
        labels: true classes `[b]`.
        ids: the images' own numbers, on which the judge's noise depends.
        threat: proposals are projected onto it before anything else; None for the originals.
        replicates: fresh draws a verification, at most.
        rule: how draws become a verdict; the two-stage rule of Hill, Mitchell, Zhu (2021) if not
            given.
        seed: the run's seed.
        purpose: names the streams; two judges of different purposes draw independently.
        count: hears of every chain-step spent.
    """

    def __init__(
        self,
        defense: PurifiedClassifier,
        originals: Tensor,
        labels: Tensor,
        *,
        ids: Sequence[int],
        threat: ThreatModel | None,
        replicates: int,
        seed: int,
        purpose: str,
        rule: Rule | None = None,
        count: Count = uncounted,
    ) -> None:
        self.defense, self.originals, self.labels = defense, originals, labels
        self.ids, self.threat, self.replicates = ids, threat, replicates
        self.seed, self.purpose, self.count = seed, purpose, count
        self.rule: Rule = rule or TwoStage()
        self._stands = torch.ones(len(labels), dtype=torch.bool)
        self._broken_at = torch.full((len(labels),), STANDS)
        self._votes = torch.full((len(labels),), float("nan"))
        self._draws = torch.zeros(len(labels), dtype=torch.int64)
        self._looks = torch.zeros(len(labels), dtype=torch.int64)
        self._undecided = torch.zeros(len(labels), dtype=torch.bool)
        self._seen = torch.zeros((2, len(labels)), dtype=torch.int64)
        self._blind = torch.zeros(len(labels), dtype=torch.int64)
        self._images = originals.clone()

    def __call__(self, proposal: Proposal) -> Tensor:
        """Judge a proposal and return which of its images still stand, bool `[b]`."""
        rows = proposal.rows.cpu()
        self.count(cost(proposal, self.defense))
        images, logits = self._admit(proposal, rows)
        self._refuse_nan(logits, rows)
        if proposal.blind is not None:
            self._blind[rows] += proposal.blind.cpu()
        standing = self._stands[rows]
        self._see(images[standing], logits[:, standing], rows[standing])
        combine = self.defense.combine
        suspects = standing & self.rule.suspects(logits, self.labels[rows], combine).cpu()
        if suspects.any():
            self._verify(images[suspects], rows[suspects], proposal.step)
        return self._stands[rows]

    @property
    def verdict(self) -> Verdict:
        """The verdict after everything heard so far."""
        return Verdict(
            stands=self._stands.clone(),
            broken_at=self._broken_at.clone(),
            votes=self._votes.clone(),
            draws=self._draws.clone(),
            undecided=self._undecided.clone(),
            images=self._images.clone(),
            seen=self._seen.clone(),
            blind=self._blind.clone(),
        )

    def strike(self, rows: Tensor) -> None:
        """Count these rows as broken before the attack began (natural errors), at step 0."""
        struck = rows.cpu()
        self._stands[struck] = False
        self._broken_at[struck] = 0

    def doubt(self, rows: Tensor) -> None:
        """Count these rows as undecided before the attack began, until it surely breaks them."""
        self._undecided[rows.cpu()] = True

    def _see(self, images: Tensor, logits: Tensor, rows: Tensor) -> None:
        right = (logits.argmax(-1) == self.labels[rows]).sum(0).cpu()
        self._images[rows] = images
        self._seen[:, rows] = torch.stack([right, torch.full_like(right, len(logits))])

    def _admit(self, proposal: Proposal, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Project the proposed images; look again at those that lay outside the threat model."""
        check_images(proposal.images, slack=float("inf"), name="the attack's images")
        if self.threat is None:
            return proposal.images, proposal.logits
        images = self.threat.project(proposal.images, self.originals[rows])
        outside = ((images - proposal.images).flatten(1).abs() > 1e-6).any(1).cpu()
        logits = proposal.logits
        if outside.any():
            logits = logits.clone()
            purpose = f"{self.purpose} admit {proposal.step}"
            logits[:, outside] = self._draw(
                images[outside], rows[outside], purpose, len(proposal.logits)
            )
        return images, logits

    def _verify(self, images: Tensor, rows: Tensor, step: int) -> None:
        self._looks[rows] += 1
        purpose = f"{self.purpose} verify {step}"

        def draw(some: Tensor, numbers: range) -> Tensor:
            logits = self._draw(images[some], rows[some], purpose, len(numbers), numbers.start)
            self._refuse_nan(logits, rows[some])
            # A deterministic defense gives one draw, which stands for all.
            return logits.expand(len(numbers), -1, -1)

        labels, looks = self.labels[rows], self._looks[rows]
        combine = self.defense.combine
        ruling = self.rule.judge(draw, labels, combine, most=self.replicates, looks=looks)
        self._enter(Ruling(*(found.cpu() for found in ruling)), rows, step)

    def _enter(self, ruling: Ruling, rows: Tensor, step: int) -> None:
        self._votes[rows] = ruling.right / ruling.draws
        self._draws[rows] = ruling.draws
        broken = rows[~ruling.stands]
        self._stands[broken] = False
        self._broken_at[broken] = step
        self._undecided[rows] |= ~ruling.decided
        self._undecided[rows[ruling.decided & ~ruling.stands]] = False

    def _draw(
        self, images: Tensor, rows: Tensor, purpose: str, replicates: int, first: int = 0
    ) -> Tensor:
        ids = [self.ids[i] for i in rows.tolist()]
        stream = Stream(self.seed, purpose, replicates, self.count, first)
        return draw_logits(self.defense, images, ids, stream)

    def _refuse_nan(self, logits: Tensor, rows: Tensor) -> None:
        refuse_nan(logits, [self.ids[i] for i in rows.tolist()])


def draw_logits(
    defense: PurifiedClassifier, images: Tensor, ids: Sequence[int], stream: Stream
) -> Tensor:
    """Return a stream's verdict logits `[r, b, classes]` of images, without a gradient."""
    count = len(attack_replicates(stream.replicates, defense))
    numbers = range(stream.first, stream.first + count)
    keys = chain_keys(stream.seed, stream.purpose, ids, numbers)
    logits = defense.verdict_logits(images, keys)
    stream.hear(keys.numel() * defense.purifier.chain_steps)
    return logits


def judge_images(
    model: Callable[[Tensor], Tensor],
    originals: Any,
    adversarial: Any,
    labels: Any = None,
    *,
    threat: ThreatModel,
    replicates: int = 150,
    screen: int = 15,
    seed: int = 0,
    rule: Rule | None = None,
) -> Verdict:
    """Judge finished adversarial images of any origin.

    Args:
        model: any classifier of [0, 1] images.
        originals: `[N, C, H, W]` in [0, 1], as `read_batch` takes them.
        adversarial: likewise; projected onto the threat model first.
        labels: true classes `[N]`; None where `originals` is a data set or a data loader.
        threat: what the attacker was allowed.
        replicates: fresh draws a verification, at most.
        screen: draws of the first look.
        seed: seed of both streams.
        rule: how draws become a verdict; the two-stage rule if not given.

    Raises:
        UsageError: images outside [0, 1] or NaN, shapes that differ, or replicates below 1.
    """
    originals, labels = read_batch(originals, labels)
    adversarial = read_images(adversarial, name="adversarial images").to(originals)
    replicates, screen = whole(replicates, "replicates"), whole(screen, "screen")
    if adversarial.shape != originals.shape or min(replicates, screen) < 1:
        raise UsageError("adversarial images must match the originals, and replicates be ≥ 1.")
    defense = as_defense(model)
    ids, seed = range(len(labels)), whole(seed, "the seed")
    with evaluating(defense):
        if len(labels):
            check_model(defense, originals, labels)
            threat.check(originals)
        judge = Judge(
            defense,
            originals,
            labels,
            ids=ids,
            threat=threat,
            replicates=replicates,
            seed=seed,
            purpose="judge",
            rule=rule,
        )
        projected = threat.project(adversarial, originals)
        logits = draw_logits(defense, projected, ids, Stream(seed, "screen", screen))
        judge(Proposal(0, torch.arange(len(labels)), projected, logits))
        return judge.verdict
