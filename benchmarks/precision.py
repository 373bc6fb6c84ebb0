"""Show that bf16 changes nothing of the shipped defenses that counts, and ship that.

    python benchmarks/precision.py     # minutes on a CPU core
    python benchmarks/precision.py --chains 200 --dry

Chains in bf16 are compared with fp32 ones, from stratified validation images; so are the classes
that the classifiers name on one purified image each; accuracies of chains are those of the shipped
classifiers. A finding is of this kind of device and of these weights; run it again when weights or
a chain change, and on each kind of device that findings should ship for.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from common import Options, Result, main

from ebm_defense import load_data, load_defense
from ebm_defense.commands.machine.precision import compare_precisions
from ebm_defense.precision.chains import Finding
from ebm_defense.precision.classifiers import Agreement
from ebm_defense.precision.findings import SHOWN
from ebm_defense.storage.files import write_text
from ebm_defense.storage.folders import shipped

FILE = Path(__file__).parent.parent / "ebm_defense" / "precision" / SHOWN


def findings(chains: int, device: torch.device) -> dict[str, Finding | Agreement]:
    """Return by key what is found of every shipped defense."""
    found: dict[str, Finding | Agreement] = {}
    for name, settings in shipped():
        defense = load_defense(name).to(device)
        images, labels = (t.to(device) for t in load_data(settings.data, "val", chains))
        new = dict(compare_precisions(defense, images, labels).values())
        for key, finding in new.items():
            print(name, key, finding, flush=True)
        found |= new
    return found


@dataclass(frozen=True, kw_only=True)
class Precision(Options):
    """Check chains and classifiers of what ships in bf16, and keep what is found in the package."""

    chains: int = 2000
    """Validation images, a chain from each."""
    dry: bool = False
    """Leave the package's file as it is."""

    def run(self) -> Result:
        """Check, and write the package's file."""
        found = findings(self.chains, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        if not self.dry:
            known = json.loads(FILE.read_text()) if FILE.exists() else {}
            known |= {key: asdict(finding) for key, finding in found.items()}
            write_text(FILE, json.dumps(known, indent=1, sort_keys=True) + "\n")
        lines = [f"- {key}: {finding}" for key, finding in found.items()]
        return Result("precision", "\n".join(lines), self.chains)


if __name__ == "__main__":
    sys.exit(main(Precision))
