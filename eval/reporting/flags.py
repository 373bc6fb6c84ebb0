"""Signs that a number should not be believed, each with its evidence and a sentence of advice."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import binom, norm

from ebm_defense.attacks import Transfer
from ebm_defense.attacks.base import Attack
from ebm_defense.eval.judging.sanity_checks import SanityChecks
from ebm_defense.eval.judging.selection import course_right
from ebm_defense.eval.judging.statistics import mcnemar, paired_p_value, share
from ebm_defense.eval.protocols.protocol import Protocol

LOG = logging.getLogger("ebm_defense.eval")

SAME = 0.05
"""Difference of logits, in their standard deviations, that rounding may make."""
LEAST_COSINE = 0.1
LATE, LOST = 5, 0.02
"""Of the last of so many parts of the steps, what an attack may still break."""
AHEAD = 0.02
"""By what share of images a weaker attack may be ahead."""
VIEWS_APART, VIEWS_LEVEL = 0.05, 1e-4
UNLIKELY = 0.05


@dataclass(frozen=True, kw_only=True)
class Flag:
    """One sign.

    Attributes:
        name: its name in `FLAGS`.
        evidence: what was seen, in numbers.
        advice: what to do.
        attacks: numbers of the attacks whose rows it concerns; none where it concerns the model.
    """

    name: str
    evidence: str
    advice: str
    attacks: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """All that flags look at: the records of a run, and a few looks at its model."""

    protocol: Protocol
    records: pd.DataFrame
    sanity_checks: SanityChecks

    def column(self, number: int, what: str) -> pd.Series:
        """Return what the records keep of an attack."""
        return self.records[f"{number} {self.protocol.attacks[number].name}: {what}"]

    def numbers(self, want: Callable[[Attack], bool]) -> list[int]:
        """Return the numbers of the attacks that are wanted."""
        return [i for i, attack in enumerate(self.protocol.attacks) if want(attack)]

    def using(self, gradient: str) -> tuple[int, ...]:
        """Return the numbers of the attacks that use the gradient of this name."""
        return tuple(
            self.numbers(lambda a: getattr(getattr(a, "gradient", None), "name", None) == gradient)
        )


Finding = Iterable[tuple[str, tuple[int, ...]]]
"""Evidence in words, and the attacks that it concerns; nothing where all is well."""


def _through(attack: Attack) -> bool:
    return getattr(getattr(attack, "gradient", None), "through_chain", False)


def _exact(attack: Attack) -> bool:
    return getattr(getattr(attack, "gradient", None), "own_curvature", False)


def _white(attack: Attack) -> bool:
    return hasattr(attack, "gradient")


def _transfer(attack: Attack) -> bool:
    return isinstance(attack, Transfer)


def _black(attack: Attack) -> bool:
    return not _white(attack) and not _transfer(attack)


def _randomised(e: Evidence) -> Finding:
    if e.sanity_checks.stochastic:
        yield "two passes of the same images differ", ()


def _probabilities(e: Evidence) -> Finding:
    if e.sanity_checks.probabilities:
        yield "every output is nonnegative and each row sums to 1", ()


def _no_gradient(e: Evidence) -> Finding:
    for name, slope in e.sanity_checks.slopes.items():
        if slope.zero or slope.broken:
            yield (
                f"of {slope.images} images the {name} gradient is 0 on {slope.zero} and NaN or "
                f"infinite on {slope.broken}",
                e.using(name),
            )
    for number, attack in enumerate(e.protocol.attacks):
        if f"{number} {attack.name}: blind" not in e.records:
            continue  # a run of before this was kept
        if blind := int((e.column(number, "blind") > 0).sum()):
            yield (
                f"the gradient of {attack.name} was NaN or infinite on {blind} of "
                f"{len(e.records)} images, and counted as 0 there",
                (number,),
            )


def _around(e: Evidence) -> Finding:
    if e.sanity_checks.curvature is not None and not e.numbers(_through):
        yield (
            "the purifier runs a chain on an energy, and no attack's gradient goes through it",
            tuple(e.numbers(_white)),
        )


def _no_curvature(e: Evidence) -> Finding:
    exact = e.numbers(_exact)
    if exact and e.sanity_checks.curvature == 0.0:
        yield "the energy's Hessian-vector product is 0 in every pixel", tuple(exact)


def _weak_signal(e: Evidence) -> Finding:
    for name, slope in e.sanity_checks.slopes.items():
        if e.sanity_checks.stochastic and not slope.zero and slope.cosine < LEAST_COSINE:
            yield (
                f"two independent {name} gradients of {slope.replicates} replicates have a cosine "
                f"of {slope.cosine:.2f}",
                e.using(name),
            )


def _replay(e: Evidence) -> Finding:
    gaps = [("two plain passes", e.sanity_checks.replay)]
    gaps += [
        (f"a plain pass and the {n} gradient's", s.drift) for n, s in e.sanity_checks.slopes.items()
    ]
    for what, gap in gaps:
        if not gap <= SAME:
            yield f"with the same noise, {what} differ by {gap:.2g} standard deviations", ()
            return


def _unbounded(e: Evidence) -> Finding:
    for name, slope in e.sanity_checks.slopes.items():
        chance = binom.sf(slope.unbounded_left - 1, slope.images, 1.0 / e.sanity_checks.classes)
        if chance < UNLIKELY:
            yield (
                f"{slope.unbounded_left} of {slope.images} images stand after PGD with the {name} "
                "gradient and no bound",
                e.using(name),
            )


def _black_ahead(e: Evidence) -> Finding:
    return _ahead(e, _black)


def _transfer_ahead(e: Evidence) -> Finding:
    return _ahead(e, _transfer)


def _ahead(e: Evidence, kind: Callable[[Attack], bool]) -> Finding:
    """Compare attacks of a kind with all white-box ones together, on images given to both."""
    white = e.numbers(_white)
    if not white:
        return
    # Of shares of predictions the least is the luckiest, which speaks for the white-box ones.
    stands = np.min([e.column(i, "stands") for i in white], axis=0)
    met = e.records.get("natural", pd.Series(1, e.records.index)).to_numpy() == 1
    for number in e.numbers(kind):
        ahead = (stands - e.column(number, "stands").to_numpy())[met]
        alone, missed = ahead.clip(0).sum(), (-ahead).clip(0).sum()
        surely = paired_p_value(ahead.clip(0), (-ahead).clip(0)) < 2 * UNLIKELY
        if surely and alone - missed > AHEAD * met.sum():
            yield (
                f"{e.protocol.attacks[number].name} broke {alone:.3g} images that no white-box "
                f"attack broke, and missed {missed:.3g} that one did",
                (number, *white),
            )


def _not_flat(e: Evidence) -> Finding:
    if e.protocol.looks == "last":
        return  # judged once, at the end, an attack has no curve
    for number, attack in enumerate(e.protocol.attacks):
        if f"{number} {attack.name}: course" in e.records:
            yield from _course_not_flat(e, number, attack)
            continue
        late = attack.looks - math.ceil(attack.looks / LATE)
        lost = int((e.column(number, "broken at") >= max(late, 1)).sum())
        total = len(e.records)
        if attack.looks > 1 and share(lost, total, interval="clopper-pearson").low > LOST:
            yield (
                f"{attack.name} broke {lost} of {total} images in the last fifth of its steps",
                (number,),
            )


def _course_not_flat(e: Evidence, number: int, attack: Attack) -> Finding:
    """Compare the attack's own draws in the end with those a fifth of its steps earlier."""
    right = course_right(e.column(number, "course"))
    looks = right.shape[1]
    if looks < LATE:
        return
    before, after = right[:, looks - 1 - math.ceil(looks / LATE)], right[:, -1]
    lost, gained = int((before > after).sum()), int((after > before).sum())
    # Looks at a random defense differ by luck too; at another one, only by what was lost.
    surely = not e.sanity_checks.stochastic or mcnemar(lost, gained) < UNLIKELY
    net = max(lost - gained, 0)
    if surely and share(net, len(right), interval="clopper-pearson").low > LOST:
        yield (
            f"in the last fifth of the steps of {attack.name} its own draws came to be wrong on "
            f"{lost} of {len(right)} images, and right on {gained}",
            (number,),
        )


def _views_differ(e: Evidence) -> Finding:
    for number, attack in enumerate(e.protocol.attacks):
        if f"{number} {attack.name}: draws" not in e.records:
            continue  # of an ensemble, the last images alone are drawn once more
        apart, chance = compare_views(*_views(e, number, attack.looks - 1))
        if chance < VIEWS_LEVEL and abs(apart) > VIEWS_APART:
            yield (
                f"the draws of {attack.name} are right {abs(apart):.0%} "
                f"{'less' if apart < 0 else 'more'} often than the judge's on the same images "
                f"(p = {chance:.1g})",
                (number,),
            )


def _views(e: Evidence, number: int, last: int) -> tuple[np.ndarray, ...]:
    """Return right draws and draws, the attack's and the judge's, of images seen to the end.

    Of every look that is judged, an image broken on the way was chosen for draws that came out
    wrong; the last look at those that were left is no choice. An image that was selected has been
    looked at once more, by draws that chose nothing.
    """
    seen = e.column(number, "attack draws") > 0
    if f"{number} {e.protocol.attacks[number].name}: broken at" in e.records:
        broken = e.column(number, "broken at")
        seen &= (broken < 0) | (broken >= last)
    draws = e.column(number, "draws")
    columns = (
        e.column(number, "attack right"),
        e.column(number, "attack draws"),
        draws - e.column(number, "failures"),
        draws,
    )
    return tuple(c[seen].to_numpy(dtype=float) for c in columns)


def compare_views(
    right: np.ndarray, draws: np.ndarray, judged_right: np.ndarray, judged: np.ndarray
) -> tuple[float, float]:
    """Return how much more often the first draws are right, and the p-value of that.

    The test of Cochran (1954) and Mantel and Haenszel (1959), one stratum an image; all `[b]`.
    """
    if not len(draws):
        return 0.0, 1.0
    total, hits = draws + judged, right + judged_right
    expected = draws * hits / total
    spread = draws * judged * hits * (total - hits) / (total**2 * np.maximum(total - 1.0, 1.0))
    apart = float((right / draws - judged_right / judged).mean())
    if not spread.sum() > 0.0:
        return apart, 1.0
    return apart, float(2.0 * norm.sf(abs((right - expected).sum()) / math.sqrt(spread.sum())))


FLAGS: dict[str, tuple[Callable[[Evidence], Finding], str]] = {
    "randomised output": (
        _randomised,
        "One pass says little: read the table of definitions, and state which one a number is.",
    ),
    "probabilities": (
        _probabilities,
        "Give the logits before the softmax; a loss on probabilities has vanishing gradients.",
    ),
    "no gradient": (
        _no_gradient,
        "The attack is blind there: replace what is not differentiable in the backward pass, or "
        "trust black-box and transfer attacks only.",
    ),
    "around the chain": (
        _around,
        "BPDA is not the strongest gradient: attack with the full one, or with the smoothed one "
        "where activations are LeakyReLU or ReLU; protocol standard takes what fits.",
    ),
    "no curvature": (
        _no_curvature,
        "The exact gradient of a piecewise linear energy is the identity's: use the smoothed one.",
    ),
    "weak signal": (
        _weak_signal,
        "The attack follows noise: give it more replicates, until the cosine is well above "
        f"{LEAST_COSINE}.",
    ),
    "replay mismatch": (
        _replay,
        "The model draws randomness of its own or answers differently when it is attacked: let it "
        "take its noise from the purifier, and look for what tells the calls apart.",
    ),
    "unbounded attack fails": (
        _unbounded,
        "Any image can be changed into any other, so the gradient is masked: do not believe the "
        "robust accuracy of these rows.",
    ),
    "black box ahead": (
        _black_ahead,
        "A white-box attack knows more and should break more: its gradient is masked.",
    ),
    "transfer ahead": (
        _transfer_ahead,
        "A white-box attack knows more and should break more: its gradient is masked.",
    ),
    "still falling": (
        _not_flat,
        "The attack was stopped too early: give it more steps, until the curve is flat.",
    ),
    "views differ": (
        _views_differ,
        "The model behaves differently towards attack and judge, as one that detects the number of "
        "replicates would: look for what tells the calls apart.",
    ),
}
"""Each flag by name: how it is found, and what to do about it."""


def raise_flags(evidence: Evidence) -> tuple[Flag, ...]:
    """Return every flag that the evidence raises, in the order of `FLAGS`."""
    return tuple(
        Flag(name=name, evidence=words, advice=advice, attacks=attacks)
        for name, (find, advice) in FLAGS.items()
        for words, attacks in find(evidence)
    )


def log_flags(flags: Iterable[Flag]) -> None:
    """Say of each flag what was seen and what to do."""
    for flag in flags:
        LOG.warning("%s: %s. %s", flag.name, flag.evidence, flag.advice)
