"""What a run found, in numbers: verdicts, accuracies, courses and costs."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
from torch import Tensor

from ebm_defense.eval.judging.rules import AsDeployed
from ebm_defense.eval.judging.selection import course_looks, course_right
from ebm_defense.eval.judging.statistics import Share, mean_share, refuse_unknown
from ebm_defense.eval.protocols.protocol import Protocol
from ebm_defense.eval.reporting.captions import attack_title
from ebm_defense.eval.reporting.flags.evidence import Flag
from ebm_defense.eval.storage.behaviour import Behaviour
from ebm_defense.eval.storage.columns import (
    CLEAN,
    NATURAL,
    WORST_OF_ALL,
    Kept,
    attack_column,
    column,
    name_of,
    stands_column,
)


@dataclass(frozen=True, kw_only=True)
class Results:
    """A finished run.

    Attributes:
        settings: all that the records depend on, as plain values.
        protocol: what was run.
        records: one row an image; see `storage.columns`.
        adversarial: by attack, the images that were judged, or broke the defense.
        flags: signs that a number should not be believed.
        originals: the images as they were, in the order of the records.
        chain_steps, seconds: cost by phase, of all processes together.
        name: stands for the defense in comparisons.
        interval: of every number: a name in `INTERVALS`, or "bootstrap".
        behaviour: how the run's model answers; None where nobody kept it.
    """

    settings: dict[str, Any]
    protocol: Protocol
    records: pd.DataFrame
    adversarial: dict[str, Tensor]
    originals: Tensor
    flags: tuple[Flag, ...] = ()
    chain_steps: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    name: str = "defended"
    interval: str = "wilson"
    behaviour: Behaviour | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        refuse_unknown(self.interval)

    def share(self, verdicts: str) -> Share:
        """Return the mean of a column of verdicts in the records, with its interval over images.

        Images that the judge's rule left undecided count both ways: the interval runs from where
        all of them are broken to where all of them stand.
        """
        low, found, high = (
            mean_share(self.outcomes(verdicts, doubt), interval=self.interval)
            for doubt in (0, None, 1)
        )
        return found._replace(low=low.low, high=high.high)

    def outcomes(self, verdicts: str, doubt: int | None = None) -> pd.Series[Any]:
        """Return a verdict in [0, 1] an image; `doubt` on those left undecided, if it is given.

        The column `WORST_OF_ALL` is of the worst image that any attack found, chosen before it was
        judged; by a published protocol's rule it is 1 where an image stands under every attack.
        """
        if verdicts == WORST_OF_ALL:
            return self._worst_outcomes(doubt)
        right = self.records[verdicts]
        undecided = self.records.get(column(name_of(verdicts), Kept.UNDECIDED), 0 * right)
        return right if doubt is None else right.where(undecided == 0, doubt)

    def _worst_outcomes(self, doubt: int | None) -> pd.Series[Any]:
        judged = column(WORST_OF_ALL, Kept.STANDS)
        if judged in self.records:
            return self.outcomes(judged, doubt)
        named = itertools.starmap(stands_column, enumerate(self.protocol.attacks))
        each = [self.outcomes(stands, doubt) for stands in named]
        return pd.concat(each, axis=1).min(axis=1)

    def robust(self, attack: int | None = None) -> Share:
        """Return robust accuracy, image by image under all attacks or under that of a number."""
        if attack is None:
            return self.share(WORST_OF_ALL)
        number = range(len(self.protocol.attacks))[attack]
        return self.share(stands_column(number, self.protocol.attacks[number]))

    def cost(self) -> float:
        """Return the chain-steps that an image of the run cost, all phases together."""
        return sum(self.chain_steps.values()) / max(len(self.records), 1)

    def prediction_cost(self) -> float:
        """Return the chain-steps of one prediction of which accuracy is: K times draws, or 0."""
        purifier = self.settings["defense"]["purifier"]
        draws = self.protocol.judge_replicates if purifier.get("stochastic", True) else 1
        if isinstance(self.protocol.verdict, AsDeployed):
            draws = self.predicted_draws()
        return float(purifier.get("steps", 0) * draws)

    def predicted_draws(self) -> int:
        """Return R, the draws that one prediction of the defense averages."""
        alone = self.draws() == 1 < self.protocol.judge_replicates
        return 1 if alone else int(self.settings["defense"].get("replicates", 1))

    def draws(self) -> int:
        """Return H, on how many draws the definitions are: one of a deterministic defense."""
        drawn = self.records.get(column(CLEAN, Kept.DRAWS))
        return self.protocol.judge_replicates if drawn is None else int(drawn.max())

    def natural(self) -> pd.Series[Any]:
        """Return the verdict in [0, 1] on each image as it was, by the attacked ones' rule."""
        return self.outcomes(self.natural_column())

    def curve(self, attack: int = -1) -> pd.Series[float]:
        """Return accuracy after each attack step, the start being step 0.

        Where one image of each is judged: by the average of the attack's own replicates at that
        step, which were no reason to look. Of a long attack at some of its steps, evenly apart. By
        a published protocol's rule: what stands after every look so far.
        """
        number = range(len(self.protocol.attacks))[attack]
        one = self.protocol.attacks[number]
        name = attack_column(number, one)
        if column(name, Kept.COURSE) in self.records:
            right = course_right(self.records[column(name, Kept.COURSE)])
            steps = course_looks(one.looks)[: right.shape[1]]
            return pd.Series(right.mean(0), index=steps, name="robust accuracy")
        broken = self.records[column(name, Kept.BROKEN_AT)]
        left = [1.0 - float(((broken >= 0) & (broken <= s)).mean()) for s in range(one.looks)]
        return pd.Series(left, name="robust accuracy")

    def final_title(self, attack: int = -1) -> str:
        """Return what the images that an attack of this number ends with are called."""
        return WORST_OF_ALL if self.passed_on() else attack_title(self.protocol.attacks[attack])

    def natural_column(self) -> str:
        """Return the column of the verdicts, by the protocol's own rule, on images as they were."""
        return CLEAN if self.judged_once() else NATURAL

    def passed_on(self) -> bool:
        """Return whether an attack got only what stood after those before it."""
        return self.protocol.ensemble and not self.judged_once()

    def judged_once(self) -> bool:
        """Return whether one image of each was judged, and that once, by whatever rule."""
        return self.protocol.judged_once
