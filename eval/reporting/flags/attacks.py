"""Signs that lie in what attacks found: beside one another, over their steps, beside the judge."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from scipy.stats import norm

from ebm_defense.attacks import Transfer
from ebm_defense.attacks.base import Attack
from ebm_defense.eval.judging.selection import course_right
from ebm_defense.eval.judging.statistics import mcnemar, paired_p_value, share
from ebm_defense.eval.reporting.flags.evidence import Evidence, Finding
from ebm_defense.eval.reporting.flags.model import UNLIKELY, white_box
from ebm_defense.eval.storage.columns import NATURAL, Kept

LATE, LOST = 5, 0.02
"""Of the last of so many parts of the steps, what an attack may still break."""
AHEAD = 0.02
"""By what share of images a weaker attack may be ahead."""
VIEWS_APART, VIEWS_LEVEL = 0.05, 1e-4


def _transfer(attack: Attack) -> bool:
    return isinstance(attack, Transfer)


def _black(attack: Attack) -> bool:
    return not white_box(attack) and not _transfer(attack)


def black_ahead(e: Evidence) -> Finding:
    """Find attacks without a gradient that broke more than all white-box ones."""
    return _ahead(e, _black)


def transfer_ahead(e: Evidence) -> Finding:
    """Find transferred images that broke more than all white-box attacks."""
    return _ahead(e, _transfer)


def _ahead(e: Evidence, kind: Callable[[Attack], bool]) -> Finding:
    """Compare attacks of a kind with all white-box ones together, on images given to both."""
    white = e.numbers(white_box)
    if not white:
        return
    # Of shares of predictions the least is the luckiest, which speaks for the white-box ones.
    stands = np.min([e.column(i, Kept.STANDS) for i in white], axis=0)
    once = e.protocol.judged_once
    met = np.ones(len(stands), dtype=bool) if once else e.records[NATURAL].to_numpy() == 1
    for number in e.numbers(kind):
        ahead = (stands - e.column(number, Kept.STANDS).to_numpy())[met]
        alone, missed = ahead.clip(0).sum(), (-ahead).clip(0).sum()
        surely = paired_p_value(ahead.clip(0), (-ahead).clip(0)) < 2 * UNLIKELY
        if surely and alone - missed > AHEAD * met.sum():
            yield (
                f"{e.protocol.attacks[number].name} broke {alone:.3g} images that no white-box "
                f"attack broke, and missed {missed:.3g} that one did",
                (number, *white),
            )


def not_flat(e: Evidence) -> Finding:
    """Find attacks that still broke images when their steps ran out."""
    if e.protocol.looks == "last":
        return  # judged once, at the end, an attack has no curve
    for number, attack in enumerate(e.protocol.attacks):
        if e.kept(number, Kept.COURSE) is not None:
            yield from _course_not_flat(e, number, attack)
            continue
        late = attack.looks - math.ceil(attack.looks / LATE)
        lost = int((e.column(number, Kept.BROKEN_AT) >= max(late, 1)).sum())
        total = len(e.records)
        if attack.looks > 1 and share(lost, total, interval="clopper-pearson").low > LOST:
            yield (
                f"{attack.name} broke {lost} of {total} images in the last fifth of its steps",
                (number,),
            )


def _course_not_flat(e: Evidence, number: int, attack: Attack) -> Finding:
    """Compare the attack's own draws in the end with those a fifth of its steps earlier."""
    right = course_right(e.column(number, Kept.COURSE))
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


def views_differ(e: Evidence) -> Finding:
    """Find attacks that saw another model than the judge did."""
    for number, attack in enumerate(e.protocol.attacks):
        if e.kept(number, Kept.DRAWS) is None:
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
    queried once more, by draws that chose nothing.
    """
    seen = e.column(number, Kept.ATTACK_DRAWS) > 0
    if (broken := e.kept(number, Kept.BROKEN_AT)) is not None:
        seen &= (broken < 0) | (broken >= last)
    draws = e.column(number, Kept.DRAWS)
    columns = (
        e.column(number, Kept.ATTACK_RIGHT),
        e.column(number, Kept.ATTACK_DRAWS),
        draws - e.column(number, Kept.FAILURES),
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
