"""What attacks do at every step: query the defense by keyed noise, ask the judge, keep the best."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ebm_defense.attacks.base import DirectCall, Judge, Proposal, attack_replicates, lenient
from ebm_defense.attacks.gradients.base import Gradient
from ebm_defense.attacks.losses import Loss
from ebm_defense.attacks.norms import per_image
from ebm_defense.defense import PurifiedClassifier
from ebm_defense.errors import UsageError
from ebm_defense.noise import KeyedNoise, chain_keys, working_dtype

LOG = logging.getLogger("ebm_defense.attacks")


class QueryResult(NamedTuple):
    """What a query showed of the images that still stand after it.

    Attributes:
        stands: which of the queried images still stand, bool on the images' device.
        loss: `[b]`.
        gradient: of the loss, `[b, C, H, W]`, in float32 at least; zero where none was asked for,
            and where it was NaN or infinite.
        logits: `[r, b, classes]`.
    """

    stands: Tensor
    loss: Tensor
    gradient: Tensor
    logits: Tensor


class AttackSession:
    """One run of an attack before a judge: its noise, the images that stand, what it found.

    Queries are numbered, and the noise of a query depends on its number and on the image alone. So
    an attack gives the same images whatever the batch, as long as the queries that it makes do not
    depend on the other images.

    Args:
        defense: what is attacked.
        images: originals `[n, C, H, W]` in [0, 1].
        labels: true classes `[n]`.
        ids: the images' own numbers.
        seed: the run's seed.
        judge: gets every query's images.
        replicates: purifications an image and query, where the defense is random.

    Attributes:
        rows: the images that still stand, `[b]`.
        queries: how many were made.
        found: `[n, C, H, W]`: the images that the judge struck, else the best that were kept, else
            the originals.
    """

    def __init__(
        self,
        defense: PurifiedClassifier,
        images: Tensor,
        labels: Tensor,
        *,
        ids: Sequence[int],
        seed: int,
        judge: Judge,
        replicates: int,
    ) -> None:
        self.defense, self.seed, self.judge = defense, seed, judge
        defense.check_deterministic(images)
        self.replicates = attack_replicates(replicates, defense)
        self._images, self._labels, self._ids = images, labels, ids
        self.rows = torch.arange(len(images))
        self.queries = 0
        self.found = images.clone()
        self._wrong = torch.zeros(len(images), dtype=torch.bool, device=images.device)
        work = working_dtype(images.dtype)
        self._loss = images.new_full((len(images),), -torch.inf, dtype=work)
        self._warned = False

    @property
    def over(self) -> bool:
        """Whether no image stands any more."""
        return not len(self.rows)

    @property
    def random(self) -> bool:
        """Whether the defense answers twice differently."""
        return self.defense.stochastic

    @property
    def originals(self) -> Tensor:
        """The images that still stand, unperturbed, `[b, C, H, W]`."""
        return self._images[self.rows]

    @property
    def labels(self) -> Tensor:
        """The true classes of the images that still stand, `[b]`."""
        return self._labels[self.rows]

    def noise(self, purpose: str) -> KeyedNoise:
        """Return noise of the attacker's own for the images that still stand."""
        keys = chain_keys(self.seed, purpose, self._standing_ids(), range(1))[0]
        return KeyedNoise(keys.to(self._images.device))

    def query(self, x: Tensor, loss: Loss, gradient: Gradient | None = None) -> QueryResult:
        """Query the defense at `x` `[b, C, H, W]`, in place of the standing images, and be judged.

        Raises:
            UsageError: the defense returned logits that are not finite.
        """
        purpose = f"attack step {self.queries}"
        keys = chain_keys(self.seed, purpose, self._standing_ids(), self.replicates)
        if gradient is not None:
            slope, logits = gradient(self.defense, x, self.labels, keys, loss)
        else:
            with torch.no_grad():
                slope, logits = torch.zeros_like(x), self.defense.replicate_logits(x, keys)
        refuse_nan(logits, self._standing_ids())
        blind = ~slope.flatten(1).isfinite().all(1)
        self._warn(blind)
        slope = slope.to(self._loss.dtype).masked_fill(per_image(blind), 0.0)
        with torch.no_grad():
            value = loss(logits, self.labels).to(self._loss.dtype)
        cost = len(self.rows) * self._cost(gradient)
        stands = self.judge(Proposal(self.queries, self.rows, x, logits, blind, cost)).cpu()
        self.found[self.rows[~stands]] = x[~stands]
        self.rows, self.queries = self.rows[stands], self.queries + 1
        return QueryResult(stands, value[stands], slope[stands], logits[:, stands])

    def keep(self, x: Tensor, seen: QueryResult) -> None:
        """Keep `x`, just seen and still standing, where it is the best so far.

        An image whose replicates are wrong on average beats one whose replicates are right, and
        among equals the higher loss wins.
        """
        rows = self.rows
        wrong = self.defense.combine(seen.logits).argmax(-1) != self.labels
        ahead = wrong & ~self._wrong[rows]
        equal = wrong == self._wrong[rows]
        better = (ahead | (equal & (seen.loss > self._loss[rows]))).cpu()
        self.found[rows[better]] = x[better]
        self._wrong[rows[better]], self._loss[rows[better]] = wrong[better], seen.loss[better]

    def _cost(self, gradient: Gradient | None) -> int:
        """Return the chain-steps of a query of one image."""
        draws = len(self.replicates)
        if gradient is None:
            return draws * self.defense.purifier.chain_steps
        return gradient.chain_steps(self.defense, draws)

    def _standing_ids(self) -> list[int]:
        return [self._ids[i] for i in self.rows.tolist()]

    def _warn(self, blind: Tensor) -> None:
        """Say once that a gradient is none; the judge counts how often."""
        if blind.any() and not self._warned:
            self._warned = True
            LOG.warning(
                "the gradient for image %s is NaN or infinite and counts as 0 there; choose "
                "another gradient or loss, or lower the purifier's step size.",
                _named(blind, self._standing_ids()),
            )


class SessionAttack(DirectCall):
    """An attack made of queries: a subclass overrides `pursue`."""

    replicates: int

    def pursue(self, session: AttackSession) -> None:
        """Query the session's images, and let it keep the best, until the budget is spent."""
        raise NotImplementedError

    def run(
        self,
        defense: PurifiedClassifier,
        images: Tensor,
        labels: Tensor,
        *,
        ids: Sequence[int],
        seed: int,
        judge: Judge = lenient,
    ) -> Tensor:
        session = AttackSession(
            defense,
            images,
            labels,
            ids=ids,
            seed=seed,
            judge=judge,
            replicates=self.replicates,
        )
        self.pursue(session)
        return session.found


def refuse_nan(logits: Tensor, ids: Sequence[int]) -> None:
    """Refuse replicate logits `[r, b, classes]` that are not finite, naming the images.

    Raises:
        UsageError: some replicate of some image is NaN or infinite.
    """
    bad = ~logits.isfinite().all(-1).all(0)
    if bad.any():
        raise UsageError(
            f"the defense returned NaN or infinite logits for image {_named(bad, ids)}; no verdict "
            "can rest on them: lower the purifier's step size, or check the classifier's weights."
        )


def _named(bad: Tensor, ids: Sequence[int]) -> str:
    return ", ".join(str(ids[i]) for i in bad.nonzero().flatten().tolist()[:10])
