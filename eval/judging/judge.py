"""Is this image broken? Decided on fresh draws, whatever the attack believes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ebm_defense.attacks.base import Proposal, attack_replicates, cost, trying
from ebm_defense.attacks.session import refuse_nan
from ebm_defense.attacks.threat import ThreatModel
from ebm_defense.defense import PurifiedClassifier, as_defense
from ebm_defense.errors import UsageError
from ebm_defense.eval.judging.check_model import check_model
from ebm_defense.eval.judging.rules import AsDeployed, Rule, Ruling, TwoStage, predicted_draws
from ebm_defense.interface.images import check_images
from ebm_defense.interface.inputs import read_batch, read_images
from ebm_defense.interface.modes import evaluating
from ebm_defense.interface.numbers import whole
from ebm_defense.noise import chain_keys

STANDS = -1
Count = Callable[[int], None]
"""Is told how many chain-steps were just spent."""


def uncounted(steps: int) -> None:
    """Take no count: these chain-steps are counted elsewhere, or by nobody."""


class Stream(NamedTuple):
    """Fresh draws for one purpose: as many replicates as named, where the defense is random,
    from the one of number `first` on.
    """

    seed: int
    purpose: str
    replicates: int
    notify: Count = uncounted
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


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What one judgement of finished images found, all `[b]` but the tensors that say otherwise.

    Attributes:
        stands: the share of predictions that are right where the rule is `AsDeployed`; of another
            rule 1 where the image stands and 0 where it is broken.
        undecided: whether the rule could not be sure.
        votes: share of the draws that were right.
        draws: how many there were.
        images: `[b, C, H, W]`: what was judged.
        logits: `[r, b, classes]`: the draws that every image got, whatever the rule.
    """

    stands: Tensor
    undecided: Tensor
    votes: Tensor
    draws: Tensor
    images: Tensor
    logits: Tensor


def judge_once(
    defense: PurifiedClassifier,
    images: Tensor,
    labels: Tensor,
    ids: Sequence[int],
    stream: Stream,
    rule: Rule,
) -> Judgement:
    """Judge images `[b, C, H, W]`, each once, on at most as many draws as the stream has."""
    shared: list[Tensor] = []

    def draw(some: Tensor, numbers: range) -> Tensor:
        chosen = [ids[i] for i in some.tolist()]
        part = stream._replace(replicates=len(numbers), first=stream.first + numbers.start)
        logits = draw_logits(defense, images[some], chosen, part)
        refuse_nan(logits, chosen)
        shared.append(logits)
        # A deterministic defense gives one draw, which stands for all.
        return logits.expand(len(numbers), -1, -1)

    found = rule.judge(
        draw,
        labels,
        defense.combine,
        most=stream.replicates,
        looks=torch.ones_like(labels),
        predicted=predicted_draws(defense),
    )
    return Judgement(
        stands=found.stands.double().cpu(),
        undecided=~found.decided.cpu(),
        votes=(found.right.float() / found.draws).cpu(),
        draws=found.draws.cpu(),
        images=images,
        logits=shared[0],
    )


class Judge:
    """Judges every look of an attack, on streams the attack never saw, as published.

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
        count: is told of every chain-step spent.
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
        self._votes = torch.full((len(labels),), float("nan"), dtype=torch.float32)
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
        """The verdict after all that was proposed so far."""
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
        self._votes[rows] = ruling.right.float() / ruling.draws
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
    stream.notify(keys.numel() * defense.purifier.chain_steps)
    return logits


def judge_images(
    model: Callable[[Tensor], Tensor],
    originals: Any,
    adversarial: Any,
    labels: Any = None,
    *,
    threat: ThreatModel,
    replicates: int = 150,
    seed: int = 0,
    rule: Rule | None = None,
) -> Judgement:
    """Judge finished adversarial images of any origin, each once.

    Args:
        model: any classifier of [0, 1] images.
        originals: `[N, C, H, W]` in [0, 1], as `read_batch` takes them.
        adversarial: likewise; projected onto the threat model first.
        labels: true classes `[N]`; None where `originals` is a data set or a data loader.
        threat: what the attacker was allowed.
        replicates: H, fresh draws an image, at most.
        seed: seed of the draws.
        rule: how draws become a verdict; `AsDeployed` if not given.

    Raises:
        UsageError: images outside [0, 1] or NaN, shapes that differ, replicates below 1 or below
            what one prediction of the model averages, or a rule that judges looks.
    """
    originals, labels = read_batch(originals, labels)
    adversarial = read_images(adversarial, name="adversarial images").to(originals)
    replicates = whole(replicates, "replicates")
    if adversarial.shape != originals.shape or replicates < 1:
        raise UsageError("adversarial images must match the originals, and replicates be ≥ 1.")
    rule = rule or AsDeployed()
    refuse_looks(rule)
    defense = as_defense(model)
    stream = Stream(whole(seed, "the seed"), "judge", replicates)
    with evaluating(defense, trying=trying([defense], originals)):
        if len(labels):
            check_model(defense, originals, labels)
            threat.check(originals)
        refuse_few(defense, rule, replicates)
        images = threat.project(adversarial, originals)
        return judge_once(defense, images, labels, range(len(labels)), stream, rule)


def refuse_looks(rule: Rule) -> None:
    """Refuse a rule that is about an attack's looks where finished images are judged.

    Raises:
        UsageError: it is the two-stage rule.
    """
    if isinstance(rule, TwoStage):
        raise UsageError(
            "the two-stage rule judges the looks of an attack, as published; an image that is "
            "judged once takes the as-deployed, the one-stage or the sequential rule."
        )


def refuse_few(defense: PurifiedClassifier, rule: Rule, replicates: int) -> None:
    """Refuse fewer draws than one prediction of the defense takes, where predictions are judged.

    Raises:
        UsageError: H < R.
    """
    needed = predicted_draws(defense)
    if isinstance(rule, AsDeployed) and replicates < needed:
        raise UsageError(
            f"as deployed, one prediction of this defense averages {needed} replicates, which "
            f"{replicates} judge replicates do not hold; give at least {needed}, or make the "
            "defense with fewer replicates."
        )
