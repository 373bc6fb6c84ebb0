"""Every sentence that stands above or below a table: what was done, in words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ebm_defense.attacks import PGD, Transfer
from ebm_defense.attacks.base import Attack
from ebm_defense.attacks.threat import fraction
from ebm_defense.eval.judging.rules import AsDeployed, Rule
from ebm_defense.eval.judging.sequential import Sequential
from ebm_defense.eval.judging.statistics import BOOTSTRAP, CONFIDENCE
from ebm_defense.eval.protocols.protocol import Protocol
from ebm_defense.eval.reporting.flags.evidence import Flag
from ebm_defense.purifiers import registry

ACCURACIES = "Accuracy in % before and after attack, and its interval."
COSTS = (
    "Costs are Langevin steps an image: of one prediction, by as many draws as its accuracy is of, "
    "and of the whole evaluation."
)
BEFORE_AND_AFTER = "Accuracy in % and its interval, as the run judged its images and judged again."
CLEAN_ONE_STAGE = "right by the average of {draws} fresh draws."
CLEAN_ALIKE = "the images as they are, by the same rule and draws."
WORST_STANDING = "images that stand under every attack of their row."
WORST_SELECTED = (
    "of each image the worst that an attack of its row found, chosen on draws of their own."
)


def attack_title(attack: Attack) -> str:
    """Return an attack's name with how it differentiates the defense."""
    gradient = getattr(attack, "gradient", None)
    return f"{attack.name} ({gradient.name}+EOT)" if gradient else attack.name


def attack_caption(attack: Attack) -> str:
    """Return one sentence that says exactly what an attack does, its name first."""
    return f"{attack.name}: {attack_details(attack)}"


def attack_details(attack: Attack) -> str:
    """Return what an attack of this name does: all its numbers, and a full stop."""
    if isinstance(attack, Transfer):
        return (
            f"its final iterates, {_steps(attack.attack)}, first seen through {attack.replicates} "
            "replicates."
        )
    if isinstance(attack, PGD):
        return (
            f"{_steps(attack)}, {attack.gradient.name} gradient, {attack.replicates} replicates a "
            "step."
        )
    gradient = getattr(attack, "gradient", None)
    through = f"{gradient.name} gradient, " if gradient else ""
    return f"{attack.threat}, {through}{attack.replicates} replicates a query."


def _steps(attack: Attack) -> str:
    if not isinstance(attack, PGD):
        return str(attack.threat)
    start = "random start" if attack.random_start else "no random start"
    size = fraction(attack.step_size)
    return f"{attack.threat}, {attack.steps} steps of {size}, {start}"


def protocol_caption(protocol: Protocol, *, once: bool) -> str:
    """Return in sentences which attacks were made, and on which images.

    Args:
        protocol: what was run.
        once: whether one image of each was judged, and that once.
    """
    said = f"Protocol {protocol.name}: {' '.join(map(attack_caption, protocol.attacks))}"
    if protocol.ensemble and once:
        said += " An attack spares the images that one before it surely broke."
    elif protocol.ensemble:
        said += " Each attack gets the images that still stand after those before it."
    if protocol.looks == "last":
        said += " Only the images that an attack ends with are judged."
    return said


def verdict_caption(protocol: Protocol, predicted: int) -> str:
    """Return in sentences on what draws, and how, images were judged.

    Args:
        protocol: what was run.
        predicted: R, the draws that one prediction of the defense averages.
    """
    rule, most = protocol.verdict, protocol.judge_replicates
    judged = f"{_judged(protocol)} {_by(rule, most)}".strip()
    if isinstance(rule, AsDeployed):
        judged += f" {AVERAGED.format(draws=predicted)}" if predicted > 1 else ""
    return judged


AVERAGED = "As deployed, a prediction averages {draws} replicates."


def _judged(protocol: Protocol) -> str:
    """Return which images came before the judge."""
    chosen = protocol.selection
    if chosen is None:
        return ""
    if chosen.candidates == 1:
        return "Of each attack the images that it ends with are judged, once."
    return (
        f"Of each attack's {chosen.candidates} strongest images the one of the lowest mean margin "
        f"on {chosen.draws} draws of its own is judged, once."
    )


def _by(rule: Rule, most: int) -> str:
    if isinstance(rule, Sequential):
        return (
            f"Judged by a sequential test of the votes at error level {rule.alpha:g}, on at most "
            f"{most} fresh replicates; undecided images count both ways in the intervals."
        )
    how = "" if isinstance(rule, AsDeployed) else f" ({rule.name} rule)"
    return f"Judged on {most} fresh replicates{how}."


def defense_caption(settings: dict[str, Any]) -> str:
    """Return what purifies, and in which precision verdicts are passed; old runs do not tell."""
    verdicts = f"; verdicts in {settings['verdicts']}" if "verdicts" in settings else ""
    return f"Purifier: {registry.caption(settings['purifier'])}{verdicts}"


def purifiers_caption(defenses: dict[str, dict[str, Any]]) -> str:
    """Return what purifies in each of several runs, by their names."""
    each = (f"{name}: {registry.caption(d['purifier'])}" for name, d in defenses.items())
    return f"Purifiers: {'; '.join(each)}."


def shard_caption(settings: dict[str, Any]) -> str:
    """Return which part of a run this is alone."""
    return f"Shard {settings['shard']} alone."


def budget_caption(settings: dict[str, Any], attacks: Sequence[Attack]) -> Iterator[str]:
    """Yield what an image costs that stands to the end; nothing where a run does not tell."""
    each = settings.get("budget", {}).get("chain_steps_an_image", 0)
    if each:
        least = "At least " if any(attack.open_ended for attack in attacks) else ""
        yield f"{least}{each:,} chain-steps an image that stands to the end."


def intervals(kind: str, *, parts: bool = False) -> str:
    """Return what intervals are.

    Args:
        kind: a name in `INTERVALS`, or "bootstrap".
        parts: whether images count with shares of predictions, of which most kinds cover more.
    """
    named = f"{CONFIDENCE:.0%} {kind.title()} intervals"
    return (
        f"{named} over images (conservative for shares)" if parts and kind != BOOTSTRAP else named
    )


def flag_caption(flag: Flag) -> str:
    """Return what was seen, and what to do about it."""
    return f"{flag.name}: {flag.evidence}. {flag.advice}"


def ensemble_caption(attacks: Sequence[Attack]) -> str:
    """Return what attacks do of which each gets what those before it left."""
    each = " ".join(map(attack_caption, attacks))
    return f"attacks one after the other on the images still standing. {each}"


def comparison_caption(*, parts: bool) -> str:
    """Return what the numbers of a comparison are; `parts` if images count with shares."""
    wide = ", which is conservative for shares of predictions" if parts else ""
    return f"Accuracy in % and its {CONFIDENCE:.0%} Wilson interval over images{wide}."


def tests_caption(*, level: float, paired: Sequence[bool], parts: bool, bold: bool) -> str:
    """Return by which tests a row is printed bold, and whether one is.

    Args:
        level: of all tests of a column together.
        paired: of each pair of runs, whether they are of the same images; at least one pair.
        parts: whether images count with shares of predictions.
        bold: whether a row is.
    """
    kind = "McNemar's exact test on the same images"
    if parts:
        kind = "a sign-flip permutation test of the differences on the same images"
    if not all(paired):
        named = "a permutation" if parts else "Fisher's exact"
        other = f"{named} test, unpaired, because runs are of different images"
        kind = f"{kind} or {other}" if any(paired) else other
    how = f"{kind}, at {level:.0%} divided by the number of comparisons."
    if bold:
        return f"Bold: better than every other row by {how}"
    return f"No row is bold: none is better than every other one by {how}"


def counts_caption(images: Sequence[int], seeds: Sequence[int]) -> str:
    """Return how many images runs have, and their seeds."""
    counts, numbers = (" or ".join(map(str, sorted(set(v)))) for v in (images, seeds))
    return f"{counts} images, seed {numbers}."


def shared_flag_caption(flags: Sequence[tuple[str, Flag]]) -> str:
    """Return what was seen of one flag in several runs, and what to do about it.

    Args:
        flags: a run's name and its flag, at least one; all of the same name.
    """
    seen: dict[str, dict[str, None]] = {}
    for run, flag in flags:
        seen.setdefault(flag.evidence, {})[run] = None
    found = "; ".join(f"{words} ({', '.join(runs)})" for words, runs in seen.items())
    return f"{flags[0][1].name}: {found}. {flags[-1][1].advice}"


def verification_caption(settings: dict[str, Any]) -> str:
    """Return what the numbers of a verification rest on, from its settings."""
    return (
        f"Before: the run's verdict on each image. After: {settings['replicates']} fresh draws on "
        f"the saved image ({settings['rule']} rule), seed {settings['seed']}, by "
        f"{settings['judge']}. {intervals('wilson')}; p is of the paired test on the same images, "
        "McNemar's or by sign flips."
    )


def corruptions_caption(settings: dict[str, Any]) -> str:
    """Return what the numbers of a run on corrupted images rest on, from its settings."""
    count, grades = len(settings["corruptions"]), settings["severities"]
    return (
        f"Mean accuracy over {count} corruptions at severities {', '.join(map(str, grades))} "
        f"(Hendrycks, Dietterich 2019), {settings['source']}. {settings['replicates']} fresh "
        f"replicates, one stage. {defense_caption(settings['defense'])}. "
        f"{settings['data']['images']} images, {intervals('wilson')} over images, "
        f"seed {settings['seed']}."
    )
