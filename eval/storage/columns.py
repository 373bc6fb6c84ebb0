"""The columns of a run's records, all named here: a row an image, under each name what was found.

Names are `CLEAN` for the images as they were, `attack_column` for what an attack made of them, and
`WORST_OF_ALL` for the worst that any of them made; a column under a name is "NAME: WHAT".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum

from ebm_defense.attacks.base import Attack

IMAGE, LABEL = "image", "label"
"""The image's number in the run's sample, and its true class."""
CLEAN = "clean"
"""The name of the images as they were; alone it is the column of the verdict on them."""
NATURAL = "natural"
"""The verdict on the images as they were by the rule that attacked images meet: of a published
protocol one beside `CLEAN`, else the same."""
CLEAN_VOTES = "clean_votes"
"""Of a published protocol: the share of the fresh draws of the clean image that were right."""
UNDEFENDED_CLEAN, UNDEFENDED_ATTACKED = "undefended_clean", "undefended_attacked"
"""Verdicts on the classifier without its purifier, before and after the last attack."""
WORST_OF_ALL = "worst of all"
"""The name of the worst of all attacks, image by image, in records and in tables."""

Columns = dict[str, Sequence[object]]
"""Columns of records by their names, each a value an image."""


class Kept(StrEnum):
    """What records keep under a name; a run of an older release has fewer of them."""

    STANDS = "stands"
    """The verdict on the attacked image, in [0, 1]: a published rule's is 0 or 1."""
    UNDECIDED = "undecided"
    """1 where the judge's rule could not be sure; the verdict is then a majority's."""
    VOTES = "votes"
    """The share of the judge's draws that were right; NaN where it never drew."""
    VERIFIED_ON = "verified on"
    """How many draws those were."""
    BROKEN_AT = "broken at"
    """Of a published protocol: the attack step that broke the image; −1 where it stands."""
    CHOSEN_AT = "chosen at"
    """The attack step whose image was selected to be judged; −1 where the attack was spared."""
    LEFT = "left"
    """1 where an attack left the image early, as surely broken."""
    COURSE = "course"
    """A character a look: "o" where the attack's own draws were right on average, "x" if not."""
    ATTACK_RIGHT = "attack right"
    """How many of the attack's own draws of the judged image were right."""
    ATTACK_DRAWS = "attack draws"
    """Of how many."""
    BLIND = "blind"
    """At how many looks the attack's gradient was NaN or infinite."""
    SIZE = "size"
    """The norm of the perturbation."""
    ATTACK = "attack"
    """Of the worst of all: the number of the attack whose image it is."""
    AS_DEPLOYED = "as deployed"
    """The share of the defense's predictions, each an average of its replicates, that are right."""
    DRAWS = "draws"
    """Fresh draws of the judged image, on which every definition of accuracy rests."""
    FAILURES = "failures"
    """How many of them were wrong."""
    MEAN_LOGITS = "mean logits"
    """1 where their mean logits were right."""
    MAJORITY = "majority"
    """1 where most of them were right; a tie is 0."""
    PREDICTED = "predicted"
    """The class that the defense names of the judged image, by the average of those draws."""
    BEFORE, AFTER = "before", "after"
    """Of a verification: the run's own verdict, and the new one."""


def column(name: str, what: Kept) -> str:
    """Return the column that holds `what` under a name."""
    return f"{name}: {what}"


def under(name: str, values: Mapping[Kept, Sequence[object]]) -> Columns:
    """Return columns under a name."""
    return {column(name, what): found for what, found in values.items()}


def name_of(verdicts: str) -> str:
    """Return the name to which a column of verdicts belongs."""
    return verdicts.removesuffix(f": {Kept.STANDS}")


def attack_column(number: int, attack: Attack) -> str:
    """Return the name under which records keep what an attack of this number made."""
    return f"{number} {attack.name}"


def stands_column(number: int, attack: Attack) -> str:
    """Return the column of the verdicts on what an attack of this number made."""
    return column(attack_column(number, attack), Kept.STANDS)
