"""`ebm-defense attacks`."""

from __future__ import annotations

from dataclasses import dataclass

from ebm_defense.attacks import Attack, ThreatModel
from ebm_defense.attacks.catalogue import ATTACKS, FAMILIES, Entry, make_attack, members
from ebm_defense.data import DATASETS
from ebm_defense.defense import PurifiedClassifier
from ebm_defense.errors import UsageError
from ebm_defense.weights import find_folder, load_defense, read_settings

UNKNOWN = "?"


@dataclass(frozen=True, kw_only=True)
class Attacks:
    """List every attack by name, and what it costs on a defense with its default numbers.

    The cost is in Langevin steps an image that stands to the end. What the attacks of other
    libraries ask of the defense is not known beforehand.
    """

    defense: str = "fashion-mnist"
    """A shipped defense or a folder, whose cost is printed."""
    libraries: bool = True
    """List the attacks of foolbox, torchattacks and ART too."""

    def run(self) -> int:
        """Print the catalogue."""
        defense = load_defense(self.defense, seed=0)
        eps = _eps(self.defense)
        print(f"{'name':<16} {'chain-steps':>12}  {'norms':<14} what it is")
        for name, entry in ATTACKS.items():
            print(_line(name, _cost(name, entry, defense, eps), " ".join(entry.norms), entry))
        for family, entry in FAMILIES.items():
            print(_line(f"{family}:NAME", UNKNOWN, " ".join(entry.norms), entry))
        if self.libraries:
            print("\nattacks of other libraries, with their norms:")
            for name, norms in members():
                print(f"{name:<60} {norms}")
        print(f"\nchain-steps an image on {self.defense}; settings in brackets: bpda(steps=20)")
        return 0


def _line(name: str, cost: str, norms: str, entry: Entry) -> str:
    return f"{name:<16} {cost:>12}  {norms:<14} {entry.summary} ({entry.source})"


def _eps(defense: str) -> float:
    data = DATASETS.get(read_settings(find_folder(defense)).data)
    return ThreatModel().eps if data is None else data.eps


def _cost(name: str, entry: Entry, defense: PurifiedClassifier, eps: float) -> str:
    try:
        attack: Attack = make_attack(name, threat=ThreatModel(norm=entry.norms[0], eps=eps))
        return f"{attack.chain_steps(defense):,}"
    except UsageError:
        return "cannot"
