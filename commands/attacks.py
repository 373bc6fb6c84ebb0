"""`ebm-defense attacks`."""

from __future__ import annotations

from dataclasses import dataclass

from ebm_defense.attacks import Attack, ThreatModel
from ebm_defense.attacks.catalogue import ATTACKS, FAMILIES, Entry, library_attacks, make_attack
from ebm_defense.data import DATASETS
from ebm_defense.defense import PurifiedClassifier
from ebm_defense.errors import UsageError
from ebm_defense.folders import find_folder, read_settings
from ebm_defense.weights import load_defense

UNKNOWN = "?"


@dataclass(frozen=True, kw_only=True)
class Attacks:
    """List every attack by name, and what it costs on a defense with its default numbers.

    The cost is in Langevin steps an image that stands to the end; ≥ marks those of other libraries
    that ask the defense more often than can be told beforehand.
    """

    defense: str = "fashion-mnist"
    """A shipped defense or a folder, whose cost is printed."""
    libraries: bool = True
    """List the attacks of foolbox, torchattacks and ART too."""

    def run(self) -> int:
        """Print the catalogue."""
        defense = load_defense(self.defense, seed=0)
        eps = _eps(self.defense)
        print(f"{'name':<18} {'chain-steps':>12}  {'norms':<14} what it is")
        for name, entry in ATTACKS.items():
            cost = _cost(name, entry.norms[0], defense, eps)
            print(_line(name, cost, " ".join(entry.norms), entry))
        for family, entry in FAMILIES.items():
            print(_line(f"{family}:NAME", UNKNOWN, " ".join(entry.norms), entry))
        if self.libraries:
            print("\nattacks of other libraries, with their chain-steps and norms:")
            for name, norms in library_attacks():
                print(f"{name:<60} {_cost(name, norms.split()[0], defense, eps):>12}  {norms}")
        print(f"\nchain-steps an image on {self.defense}; settings in brackets: bpda(steps=20)")
        return 0


def _line(name: str, cost: str, norms: str, entry: Entry) -> str:
    return f"{name:<18} {cost:>12}  {norms:<14} {entry.summary} ({entry.source})"


def _eps(defense: str) -> float:
    data = DATASETS.get(read_settings(find_folder(defense)).data)
    return ThreatModel().eps if data is None else data.eps


def _cost(name: str, norm: str, defense: PurifiedClassifier, eps: float) -> str:
    try:
        attack: Attack = make_attack(name, threat=ThreatModel(norm=norm, eps=eps))
        least = "≥ " if attack.open_ended else ""
        return f"{least}{attack.chain_steps(defense):,}"
    except UsageError:
        return "cannot"
