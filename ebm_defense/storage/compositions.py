"""Energies composed of energies that are named, so that a command line can ask for them.

`--energy "ebm_defense.storage.compositions:product(parts=['fashion-mnist-longrun', 'mine'])"`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ebm_defense.energies.classes import LogSumExpEnergy
from ebm_defense.energies.composition import And, Not, Or
from ebm_defense.errors import UsageError
from ebm_defense.storage.weights import load_defense, load_energy


def part(name: str) -> nn.Module:
    """Load an energy by its name.

    Args:
        name: a shipped name, a folder or hf://owner/name for that energy; or `NAME#CLASS`, such as
            `fashion-mnist#3`, for the energy −f_y(x) of one class under the undefended classifier
            of a defense, a class-conditional expert (Grathwohl et al. 2020).

    Raises:
        UsageError: there is no such energy, or a class that is no number.
    """
    source, mark, label = name.rpartition("#")
    if not mark:
        return load_energy(name)
    if not label.isdecimal():
        raise UsageError(f"{name!r} must end in the number of a class, as in {source}#3.")
    classifier = load_defense(source).undefended.requires_grad_(False)
    return LogSumExpEnergy(classifier, unit=True, classes=(int(label),))


def product(parts: Sequence[str], weights: Sequence[float] | None = None) -> And:
    """Return the energy of the product of densities, `And`.

    Args:
        parts: two names or more, as `part` takes them.
        weights: one above 0 for each; all 1 if not given.

    Raises:
        UsageError: as `part` and `And`.
    """
    return And(*map(part, parts), weights=weights)


def mixture(
    parts: Sequence[str], sharpness: float = 100.0, weights: Sequence[float] | None = None
) -> Or:
    """Return the energy of a mixture of densities, `Or`.

    Args:
        parts: two names or more, as `part` takes them.
        sharpness: s > 0, in units of 1/energy; 1/T for the mixture itself.
        weights: one above 0 for each; all 1 if not given.

    Raises:
        UsageError: as `part` and `Or`.
    """
    return Or(*map(part, parts), sharpness=sharpness, weights=weights)


def quotient(wanted: str, negated: str, strength: float = 1e-3) -> Not:
    """Return the energy of a density divided by a power of another, `Not`.

    Args:
        wanted: a name, as `part` takes it.
        negated: likewise.
        strength: the power, 0 or more.

    Raises:
        UsageError: as `part` and `Not`.
    """
    return Not(part(wanted), part(negated), strength)
