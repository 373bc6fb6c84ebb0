"""Every purifier by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ebm_defense.errors import UsageError
from ebm_defense.purifiers.attributes import AttributePurifier
from ebm_defense.purifiers.base import Purifier
from ebm_defense.purifiers.baselines import (
    BitDepth,
    GaussianNoise,
    Jpeg,
    MedianFilter,
    NoPurifier,
    TotalVariation,
)
from ebm_defense.purifiers.diffusion import DiffusionPurifier, LikelihoodPurifier
from ebm_defense.purifiers.gebm import GEBMPurifier
from ebm_defense.purifiers.hat import HatPurifier
from ebm_defense.purifiers.langevin import LangevinPurifier
from ebm_defense.purifiers.latent import LatentPurifier
from ebm_defense.purifiers.pair import PairPurifier

PURIFIERS: dict[str, type[Purifier]] = {
    "none": NoPurifier,
    "gaussian": GaussianNoise,
    "jpeg": Jpeg,
    "bits": BitDepth,
    "tv": TotalVariation,
    "median": MedianFilter,
    "langevin": LangevinPurifier,
    "hat": HatPurifier,
    "gebm": GEBMPurifier,
    "latent": LatentPurifier,
    "pair": PairPurifier,
    "attributes": AttributePurifier,
    "diffusion": DiffusionPurifier,
    "likelihood": LikelihoodPurifier,
}
"""By the names that commands and defense folders know."""


def name_of(purifier: Purifier) -> str | None:
    """Return a purifier's name in `PURIFIERS`; None for one that has none."""
    return next((name for name, kind in PURIFIERS.items() if kind is type(purifier)), None)


def kind_of(record: Mapping[str, Any]) -> type[Purifier] | None:
    """Return the class of which a run kept this record; None if it is not in `PURIFIERS`."""
    return next((k for k in PURIFIERS.values() if k.__name__ == record["kind"]), None)


def caption(record: Mapping[str, Any]) -> str:
    """Return in one line what a purifier is of which a run kept this record."""
    kind = kind_of(record)
    if kind is not None and kind.caption:
        try:
            return kind.described(record)
        except KeyError:
            pass  # a record of another version
    plain = ((k, v) for k, v in record.items() if isinstance(v, float | int))
    numbers = ", ".join(f"{k} {v:g}" for k, v in plain if not isinstance(v, bool))
    return f"{record['kind']} {numbers}".strip()


def baseline(spec: str) -> Purifier:
    """Make a purifier without networks from its name and its numbers: "none", "gaussian:0.25",
    "jpeg:75", "bits:3", "tv:0.1" or "median:3"; several numbers are parted by commas.

    Raises:
        UsageError: an unknown name or a number out of range.
    """
    name, colon, values = spec.partition(":")
    kind = PURIFIERS.get(name)
    if kind is None or needs_networks(kind) or (colon and not kind.arguments()):
        raise UsageError(f"unknown purifier {spec!r}; choose {', '.join(baselines())}.")
    if not kind.arguments():
        return kind()
    types = kind.arguments().values()
    try:
        given = [make(value) for make, value in zip(types, values.split(","), strict=True)]
        return kind(*given)
    except ValueError as error:
        if isinstance(error, UsageError):
            raise
        takes = ", ".join(kind.arguments())
        raise UsageError(
            f"{spec!r} needs a number after the colon, as in {name}:3, for each of its settings "
            f"({takes})."
        ) from None


def baselines() -> list[str]:
    """Return how purifiers are named on a command line: with their number, or their folder."""

    def after(kind: type[Purifier]) -> list[str]:
        return ["FOLDER"] if needs_networks(kind) else ["NUMBER"][: len(kind.arguments())]

    return [":".join([name, *after(kind)]) for name, kind in PURIFIERS.items()]


def needs_networks(kind: type[Purifier]) -> bool:
    """Whether a purifier's constructor wants what cannot be written as a number."""
    return any(hint not in (int, float) for hint in kind.arguments().values())
