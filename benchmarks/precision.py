"""Show that the shipped energies' bf16 chains purify as their fp32 ones do, and ship that.

    python benchmarks/precision.py     # minutes on a CPU core
    python benchmarks/precision.py --chains 200 --dry

Chains start from stratified validation images; accuracies are those of the shipped classifiers on
one purified image each. A finding is of this kind of device and of these weights; run it again
when an energy or its chain changes, and on each kind of device that findings should ship for.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from ebm_defense import LangevinPurifier, load_data, load_defense
from ebm_defense.files import write_text
from ebm_defense.memory import keep_freed_memory
from ebm_defense.precision import SHOWN, Finding, check, finding_key
from ebm_defense.weights import shipped

FILE = Path(__file__).parent.parent / "ebm_defense" / "engine" / SHOWN


def findings(chains: int, device: torch.device) -> dict[str, tuple[str, Finding]]:
    """Return key -> (defense, finding) of every shipped Langevin defense."""
    found = {}
    for name, settings in shipped():
        defense = load_defense(name).to(device)
        purifier = defense.purifier
        if not isinstance(purifier, LangevinPurifier):
            continue
        images, labels = (t.to(device) for t in load_data(settings.data, "val", chains))
        finding = check(
            purifier.energy, images, purifier.settings,
            chains=chains, classify=defense.classifier, labels=labels,
        )  # fmt: skip
        key = finding_key(purifier.energy, images, purifier.settings)
        found[key] = (name, finding)
        print(name, key, finding, flush=True)
    return found


def main() -> int:
    """Check, print, and write the package's file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chains", type=int, default=2000)
    parser.add_argument("--dry", action="store_true", help="print only")
    given = parser.parse_args()
    keep_freed_memory()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = findings(given.chains, device)
    if not given.dry:
        known = json.loads(FILE.read_text()) if FILE.exists() else {}
        known |= {key: asdict(finding) for key, (_, finding) in found.items()}
        write_text(FILE, json.dumps(known, indent=1, sort_keys=True) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
