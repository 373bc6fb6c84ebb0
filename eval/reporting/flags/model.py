"""Signs that lie in a model, or in how attacks differentiate it."""

from __future__ import annotations

from scipy.stats import binom

from ebm_defense.attacks.base import Attack
from ebm_defense.eval.reporting.flags.evidence import Evidence, Finding
from ebm_defense.eval.storage.columns import CLEAN, LABEL, NATURAL, UNDEFENDED_CLEAN, Kept

SAME = 0.05
"""Difference of logits, in their standard deviations, that rounding may make."""
LEAST_COSINE = 0.1
UNLIKELY = 0.05
EACH = 2
"""Images a class that show how many classes there are."""
HALF, HARDLY = 0.5, 1e-3


def white_box(attack: Attack) -> bool:
    """Whether an attack differentiates the defense."""
    return hasattr(attack, "gradient")


def _through(attack: Attack) -> bool:
    return getattr(getattr(attack, "gradient", None), "through_chain", False)


def _exact(attack: Attack) -> bool:
    return getattr(getattr(attack, "gradient", None), "own_curvature", False)


def randomised(e: Evidence) -> Finding:
    """Find whether the model's output is random."""
    if e.sanity_checks.stochastic:
        yield "two passes of the same images differ", ()


def other_classes(e: Evidence) -> Finding:
    """Find whether labels are numbered otherwise than the model's outputs."""
    verdicts = e.records[CLEAN if CLEAN in e.records else NATURAL]
    labels, right = e.records[LABEL], float(verdicts.mean())
    seen, outputs = labels.nunique(), e.sanity_checks.classes
    # So many images would show more classes if there were more; and most answers are wrong.
    if len(labels) >= EACH * seen and seen < outputs and right < 0.5:
        yield (
            f"the model tells {outputs:,} classes apart, the labels name {seen} (up to "
            f"{labels.max()}), and {right:.0%} of its answers are right",
            (),
        )


def probabilities(e: Evidence) -> Finding:
    """Find whether the model gives probabilities, not logits."""
    if e.sanity_checks.probabilities:
        yield "every output is nonnegative and each row sums to 1", ()


def no_gradient(e: Evidence) -> Finding:
    """Find gradients that are 0, NaN or infinite."""
    for name, slope in e.sanity_checks.slopes.items():
        if slope.zero or slope.broken:
            yield (
                f"of {slope.images} images the {name} gradient is 0 on {slope.zero} and NaN or "
                f"infinite on {slope.broken}",
                e.using(name),
            )
    for number, attack in enumerate(e.protocol.attacks):
        blind = e.kept(number, Kept.BLIND)  # older runs kept none
        if blind is not None and (count := int((blind > 0).sum())):
            yield (
                f"the gradient of {attack.name} was NaN or infinite on {count} of "
                f"{len(e.records)} images, and counted as 0 there",
                (number,),
            )


def around(e: Evidence) -> Finding:
    """Find whether no attack's gradient goes through the purifier's chain."""
    if e.sanity_checks.curvature is not None and not e.numbers(_through):
        yield (
            "the purifier runs a chain on an energy, and no attack's gradient goes through it",
            tuple(e.numbers(white_box)),
        )


def no_curvature(e: Evidence) -> Finding:
    """Find exact gradients of an energy that has no curvature."""
    exact = e.numbers(_exact)
    if exact and e.sanity_checks.curvature == 0.0:
        yield "the energy's Hessian-vector product is 0 in every pixel", tuple(exact)


def weak_signal(e: Evidence) -> Finding:
    """Find gradients of too few replicates."""
    for name, slope in e.sanity_checks.slopes.items():
        if e.sanity_checks.stochastic and not slope.zero and slope.cosine < LEAST_COSINE:
            yield (
                f"two independent {name} gradients of {slope.replicates} replicates have a cosine "
                f"of {slope.cosine:.2f}",
                e.using(name),
            )


def replay(e: Evidence) -> Finding:
    """Find whether the same noise gives other logits the second time."""
    gaps = [("two plain passes", e.sanity_checks.replay)]
    gaps += [
        (f"a plain pass and the {n} gradient's", s.drift) for n, s in e.sanity_checks.slopes.items()
    ]
    for what, gap in gaps:
        if not gap <= SAME:
            yield f"with the same noise, {what} differ by {gap:.2g} standard deviations", ()
            return


def unbounded(e: Evidence) -> Finding:
    """Find gradients by which an attack without a bound breaks less than chance."""
    for name, slope in e.sanity_checks.slopes.items():
        chance = binom.sf(slope.unbounded_left - 1, slope.images, 1.0 / e.sanity_checks.classes)
        if chance < UNLIKELY:
            yield (
                f"{slope.unbounded_left} of {slope.images} images stand after PGD with the {name} "
                "gradient and no bound",
                e.using(name),
            )


def destroys(e: Evidence) -> Finding:
    """Find a purifier behind which most of what the classifier knew of clean images is lost."""
    if UNDEFENDED_CLEAN not in e.records:
        return
    judged = CLEAN if CLEAN in e.records else NATURAL
    bare, clean = (e.records[name] > HALF for name in (UNDEFENDED_CLEAN, judged))
    lost, gained = int((bare & ~clean).sum()), int((~bare & clean).sum())
    surely = binom.sf(lost - 1, lost + gained, 0.5) < HARDLY
    if surely and clean.sum() < HALF * bare.sum():
        yield (
            f"of {len(e.records)} clean images {int(bare.sum())} are right without the purifier "
            f"and {int(clean.sum())} behind it",
            (),
        )
