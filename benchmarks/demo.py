"""The demo's table, as `make demo` prints it: the README shows what is kept of it.

python benchmarks/demo.py && python docs/fill.py     # a minute or two
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from common import Options, Result, main

from ebm_defense.commands.evaluation.evaluate import Evaluate
from ebm_defense.eval import load_run


@dataclass(frozen=True, kw_only=True)
class Demo(Options):
    """Run the demo, and keep its table."""

    def run(self) -> Result:
        """Run `ebm-defense evaluate` with its defaults, or read a finished run of them."""
        folder = self.out / "demo"
        Evaluate(out=folder, seed=self.seed).run()
        report = load_run(folder)
        return Result("demo", report.to_markdown(), len(report.records))


if __name__ == "__main__":
    sys.exit(main(Demo))
