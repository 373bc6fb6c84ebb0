"""Which of the images that an attack proposes is judged: chosen on draws that the judge never sees.

An attack looks many times through few replicates, and the look that seemed worst was also the
luckiest. So its few strongest images are drawn afresh, all on the same noise; the lowest mean
margin is chosen, and that one alone comes before the judge, whose draws decide nothing of this.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy.stats import binom
from torch import Tensor

from ebm_defense.attacks.base import Attack, Proposal, cost
from ebm_defense.attacks.session import refuse_nan
from ebm_defense.attacks.shortlist import Candidates, Shortlist, alike, mean_margins, strongest
from ebm_defense.defense import PurifiedClassifier
from ebm_defense.errors import UsageError
from ebm_defense.eval.judging.judge import Stream, draw_logits
from ebm_defense.eval.judging.rules import predicted_draws
from ebm_defense.interface.images import check_images
from ebm_defense.interface.numbers import plain_numbers

SELDOM = 0.01
"""An image is surely broken where its prediction is right less often than this."""
COURSE = 100
"""Parts of an attack of which the records keep the attack's own draws."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """How the image that is judged is chosen from those that an attack proposes.

    Attributes:
        draws: fresh draws of each candidate, at least 1.
        candidates: how many are drawn: the strongest by the attack's own draws, and the last one;
            of one, what the attack returns in the end, which needs no draws.
        leave: the level at which an attack may leave an image that is surely broken, from 0
            (never) to below 1. See `draws_to_leave`.

    Raises:
        UsageError: a number out of range.
    """

    draws: int = 32
    candidates: int = 4
    leave: float = 0.01

    def __post_init__(self) -> None:
        plain_numbers(self)
        if min(self.draws, self.candidates) < 1 or not 0.0 <= self.leave < 1.0:
            raise UsageError(
                "a selection needs draws ≥ 1, candidates ≥ 1 and 0 ≤ leave < 1, not "
                f"{self.draws}, {self.candidates} and {self.leave}."
            )

    def chain_steps(self, defense: PurifiedClassifier, attack: Attack) -> int:
        """Return the Langevin steps that choosing an attack's image costs, at most."""
        places = min(self.candidates, attack.looks)
        if places == 1 or not defense.stochastic:
            return 0
        return places * self.draws * defense.purifier.chain_steps


@cache
def draws_to_leave(level: float, test: int, replicates: int) -> int:
    """Return how many fresh draws, wrong every one, say that an image is surely broken.

    With q the chance that a draw is right, the majority of R = `replicates` draws is right with at
    most the chance that R/2 or more of them are. Where q is so large that this is `SELDOM`, as
    many wrong draws in a row as are returned here come with a chance of at most
    level/(k(k + 1)), k = `test`, the image's k-th time; and these sum to the level.
    """
    low, high = 0.0, 1.0
    for _ in range(50):
        q = (low + high) / 2.0
        seldom = binom.sf(math.ceil(replicates / 2) - 1, replicates, q) <= SELDOM
        low, high = (q, high) if seldom else (low, q)
    return math.ceil(math.log(level / (test * (test + 1.0))) / math.log1p(-low))


class Chosen(NamedTuple):
    """The images to be judged, all `[n]` but `images`.

    Attributes:
        images: `[n, C, H, W]`.
        steps: the attack's steps that they come from.
        left: whether the attack left it early, as surely broken.
        blind: at how many looks the attack's gradient was NaN or infinite.
        course: of each image a character a look, at most `COURSE` + 1 of them: "o" where the
            attack's own replicates were right on average, "x" where they were wrong, or the attack
            had left it.
    """

    images: Tensor
    steps: Tensor
    left: Tensor
    blind: Tensor
    course: list[str]


class Selector:
    """Takes what one attack proposes of some images, and chooses in the end.

    Args:
        defense: what is attacked.
        attack: whose proposals they are.
        originals: `[n, C, H, W]`.
        labels: true classes `[n]`.
        ids: the images' own numbers.
        selection: how to choose.
        stream: its seed, its name and whom it notifies of costs are those of the draws here.
    """

    def __init__(
        self,
        defense: PurifiedClassifier,
        attack: Attack,
        originals: Tensor,
        labels: Tensor,
        *,
        ids: list[int],
        selection: Selection,
        stream: Stream,
    ) -> None:
        self.defense, self.attack, self.selection, self.stream = defense, attack, selection, stream
        self.originals, self.labels, self.ids = originals, labels, ids
        count = len(labels)
        self._shortlist = Shortlist(originals, selection.candidates)
        self._proposed, self._blind, self._tests, self._next = torch.zeros(
            (4, count), dtype=torch.int64
        )
        self._left = torch.zeros(count, dtype=torch.bool)
        self._images, self._steps = originals.clone(), torch.zeros(count, dtype=torch.int64)
        self._right: list[Tensor] = []

    def __call__(self, proposal: Proposal) -> Tensor:
        """Take a proposal, and return which of its images the attack goes on with."""
        self.stream.notify(cost(proposal, self.defense))
        rows = proposal.rows.cpu()
        images = self._admit(proposal.images, rows)
        refuse_nan(proposal.logits, self._ids(rows))
        margins = mean_margins(self.defense, proposal.logits, self.labels[rows]).cpu()
        self._shortlist.offer(rows, images, margins, proposal.step)
        self._note(proposal, rows, margins >= 0)
        left = self._leave(images, rows, proposal.logits)
        self._left[rows[left]] = True
        self._images[rows[left]], self._steps[rows[left]] = images[left], proposal.step
        return ~left

    def _admit(self, images: Tensor, rows: Tensor) -> Tensor:
        check_images(images, slack=float("inf"), name="the attack's images")
        return self.attack.threat.project(images, self.originals[rows])

    def _ids(self, rows: Tensor) -> list[int]:
        return [self.ids[i] for i in rows.tolist()]

    def _note(self, proposal: Proposal, rows: Tensor, right: Tensor) -> None:
        self._proposed[rows] += 1
        if proposal.blind is not None:
            self._blind[rows] += proposal.blind.cpu()
        everywhere = torch.zeros(len(self.labels), dtype=torch.bool)
        everywhere[rows] = right
        self._right.append(everywhere)

    def _leave(self, images: Tensor, rows: Tensor, logits: Tensor) -> Tensor:
        """Return which images are surely broken, by fresh draws where the defense is random."""
        wrong = (logits.argmax(-1) != self.labels[rows]).all(0).cpu()
        if not self.defense.stochastic:
            return wrong & bool(self.selection.leave)
        left = torch.zeros(len(rows), dtype=torch.bool)
        due = wrong & (self._proposed[rows] >= self._next[rows])
        for test in sorted(set(self._tests[rows[due]].tolist())) if self.selection.leave else []:
            some = (due & (self._tests[rows] == test)).nonzero().flatten()
            left[some] = self._surely_broken(images[some], rows[some], test + 1, len(logits))
        return left

    def _surely_broken(self, images: Tensor, rows: Tensor, test: int, replicates: int) -> Tensor:
        draws = draws_to_leave(self.selection.leave, test, predicted_draws(self.defense))
        worth = draws < (self.attack.looks - self._proposed[rows]) * replicates
        found = torch.zeros(len(rows), dtype=torch.bool)
        if worth.any():
            some = rows[worth]
            logits = self._draw(images[worth], some, f"leave {test}", draws)
            wrong = (logits.argmax(-1) != self.labels[some]).all(0)
            found[worth] = (
                wrong & (mean_margins(self.defense, logits, self.labels[some]) < 0)
            ).cpu()
            self._tests[some] += 1
            # A test that fails is not made again before as much again was done.
            self._next[some] = 2 * self._proposed[some]
        return found

    def _draw(self, images: Tensor, rows: Tensor, purpose: str, draws: int) -> Tensor:
        purpose = f"{self.stream.purpose} {purpose}"
        stream = self.stream._replace(purpose=purpose, replicates=draws)
        logits = draw_logits(self.defense, images, self._ids(rows), stream)
        refuse_nan(logits, self._ids(rows))
        return logits

    def choose(self, returned: Tensor) -> Chosen:
        """Return what is to be judged.

        Args:
            returned: what the attack returned, `[n, C, H, W]`: the only candidate where one is
                asked for, or where nothing was proposed.
        """
        alone = self.selection.candidates == 1
        lacking = ((self._proposed == 0) | alone).nonzero().flatten()
        if len(lacking):
            images = self._admit(returned[lacking], lacking)
            last = self.attack.looks - 1
            self._shortlist.offer(
                lacking, images, torch.zeros(len(lacking), dtype=torch.float32), last
            )
        going = (~self._left).nonzero().flatten()
        kept = Candidates(*(values[:, going] for values in self._shortlist.candidates()))
        margins = kept.margins
        if self.defense.stochastic:
            margins = draw_margins(kept, lambda some, x: self._margins(x, going[some]))
        place, every = strongest(kept, margins), torch.arange(len(going))
        self._images[going] = kept.images[place, every]
        self._steps[going] = kept.steps[place, every]
        return Chosen(self._images, self._steps, self._left, self._blind, self._course())

    def _margins(self, images: Tensor, rows: Tensor) -> Tensor:
        logits = self._draw(images, rows, "select", self.selection.draws)
        return mean_margins(self.defense, logits, self.labels[rows])

    def _course(self) -> list[str]:
        right = torch.stack(self._right) if self._right else torch.zeros((0, len(self.labels)))
        kept = right[course_looks(len(right))]
        return ["".join("o" if r else "x" for r in image) for image in kept.T.tolist()]


def course_looks(looks: int) -> list[int]:
    """Return the looks whose outcome is kept, of so many: all, or some evenly apart."""
    parts = min(looks - 1, COURSE)
    return [round(i * (looks - 1) / max(parts, 1)) for i in range(parts + 1)]


def course_right(courses: pd.Series[Any]) -> NDArray[np.float64]:
    """Return 1 or 0 an image and kept look, `[n, looks]`, from the records' courses.

    Images that an attack spared are as the attacks before it left them: wrong.
    """
    seen = courses.fillna("").astype(str)
    looks = int(seen.str.len().max())
    right = [[1.0 if mark == "o" else 0.0 for mark in one.ljust(looks, "x")] for one in seen]
    return np.array(right, dtype=float).reshape(len(seen), looks)


def draw_margins(candidates: Candidates, draw: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Return the margins `[k, n]` of candidates by fresh draws, the same noise for all of an image.

    An image's only candidate needs no draws.

    Args:
        candidates: `k` for each of `n` images.
        draw: maps indices of images, and candidates for them, to mean margins.
    """
    margins = torch.zeros(candidates.filled.shape, dtype=torch.float64)
    several = candidates.filled.sum(0) > 1
    for place, filled in enumerate(candidates.filled):
        some = (filled & several).nonzero().flatten()
        if len(some):
            margins[place, some] = draw(some, candidates.images[place, some]).double().cpu()
    return margins


def worst_place(
    defense: PurifiedClassifier,
    images: Tensor,
    labels: Tensor,
    ids: Sequence[int],
    stream: Stream,
    left: Tensor | None = None,
) -> Tensor:
    """Return which of `k` attacks found the worst of each image, by the same draws of all, `[n]`.

    Args:
        defense: what is attacked.
        images: what the attacks found, `[k, n, C, H, W]`.
        labels: true classes `[n]`.
        ids: the images' own numbers.
        stream: the draws of each candidate.
        left: which of them are surely broken, bool `[k, n]`: the first of those is the worst.
    """
    filled = torch.ones(images.shape[:2], dtype=torch.bool)
    if left is not None:
        filled = torch.where(left.any(0), left & (left.int().cumsum(0) == 1), filled)
    for place in range(1, len(images)):
        filled[place] &= ~(alike(images[:place], images[place][None]) & filled[:place]).any(0)

    def draw(some: Tensor, x: Tensor) -> Tensor:
        own = [ids[i] for i in some.tolist()]
        logits = draw_logits(defense, x, own, stream)
        refuse_nan(logits, own)
        return mean_margins(defense, logits, labels[some])

    none = torch.zeros(filled.shape, dtype=torch.float32)
    candidates = Candidates(images, none, none.long(), filled)
    return strongest(candidates, draw_margins(candidates, draw))
