"""Audit the defenses that ship, whether each resists or only hides its gradient.

`ebm-defense audit` on each, with its page and picture kept in OUT; a page that is there is not made
again.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from common import Options, Result, main

from ebm_defense.commands.evaluation.audit import PAGE, AuditCommand

CONTROL = "fashion-mnist-adversarial"


@dataclass(frozen=True, kw_only=True)
class Audits(Options):
    """Audit shipped defenses on test images; attacks transfer from the adversarial one."""

    defenses: tuple[str, ...] = (
        "fashion-mnist",
        "fashion-mnist-together",
        CONTROL,
        "fashion-mnist-gaussian",
    )
    """Shipped names or folders."""
    images: int = 50
    """How many test images, a stratified sample."""
    steps: int = 20
    """Steps of each attack by gradient."""
    replicates: int = 2
    """Attack replicates of a step."""
    many: int = 64
    """Those of the attack that averages more noise away."""
    draws: int = 16
    """Fresh replicates that judge."""

    def run(self) -> Result:
        """Audit each, and put the pages one after another."""
        pages = [self._page(name) for name in self.defenses]
        return Result("audits", "\n\n".join(pages), self.images * len(pages))

    def _page(self, name: str) -> str:
        folder = Path(self.out) / Path(name).name
        if not (folder / PAGE).exists():
            AuditCommand(
                defense=name, out=folder, data="fashion-mnist", images=self.images,
                transfer_from=None if name == CONTROL else CONTROL, steps=self.steps,
                replicates=self.replicates, many=self.many, draws=self.draws, seed=self.seed,
            ).run()  # fmt: skip
        return (folder / PAGE).read_text(encoding="utf-8").strip()


if __name__ == "__main__":
    sys.exit(main(Audits))
