"""`ebm-defense attacks`."""

from __future__ import annotations

from dataclasses import dataclass

from ebm_defense.attacks import Attack, ThreatModel
from ebm_defense.attacks.catalogue import ATTACKS, FAMILIES, Entry, library_attacks, make_attack
from ebm_defense.data import DATASETS
from ebm_defense.defense import PurifiedClassifier
from ebm_defense.errors import UsageError
from ebm_defense.eval.reporting.renderers import RENDERERS
from ebm_defense.eval.reporting.table import Cell, Column, Table
from ebm_defense.storage.folders import find_folder, read_settings
from ebm_defense.storage.weights import load_defense

UNKNOWN = "?"
COLUMNS = (Column("name"), Column("chain-steps", "r"), Column("norms"), Column("what it is"))


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
        defense, eps = load_defense(self.defense, seed=0), _eps(self.defense)
        own = [_row(name, _cost(name, e.norms[0], defense, eps), e) for name, e in ATTACKS.items()]
        families = [_row(f"{family}:NAME", UNKNOWN, entry) for family, entry in FAMILIES.items()]
        print(RENDERERS["text"](Table(columns=COLUMNS, rows=(*own, *families))))
        if self.libraries:
            found = (
                (name, _cost(name, norms.split()[0], defense, eps), norms)
                for name, norms in library_attacks()
            )
            rows = tuple(tuple(map(Cell, row)) for row in found)
            print(RENDERERS["text"](Table(columns=COLUMNS[:3], rows=rows)))
        print(f"chain-steps an image on {self.defense}; settings in brackets: bpda(steps=20)")
        return 0


def _row(name: str, cost: str, entry: Entry) -> tuple[Cell, ...]:
    words = (name, cost, " ".join(entry.norms), f"{entry.summary} ({entry.source})")
    return tuple(map(Cell, words))


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
