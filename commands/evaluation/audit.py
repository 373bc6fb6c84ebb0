"""`ebm-defense audit`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from ebm_defense.attacks import ThreatModel
from ebm_defense.attacks.gradients.registry import fitting_gradient, make_gradient
from ebm_defense.commands.options.photos import Photos, wanted_by
from ebm_defense.commands.options.shared import Device, put_on, resolve_device
from ebm_defense.data import dataset
from ebm_defense.eval.audit import AuditSettings, audit, verdicts
from ebm_defense.eval.reporting.audit_page import audit_text, draw_audit
from ebm_defense.storage.files import writable_folder, write_text
from ebm_defense.storage.weights import load_defense

PAGE, PICTURE = "audit.md", "audit.png"


@dataclass(frozen=True, kw_only=True)
class AuditCommand:
    """Ask whether a defense is robust or only hides its gradient: one page, a verdict a line.

    Frozen noise, many replicates, larger eps until chance, random and transferred attacks, Square,
    the loss surface, and how far the chain takes perturbations back by its steps.
    """

    defense: Annotated[str, tyro.conf.Positional]
    """A shipped defense or a folder."""
    out: Path = Path("audit")
    """Folder for the page and the picture."""
    transfer_from: str | None = None
    """The defense, best an adversarially trained one, from which attacks transfer."""
    data: str = "fashion-mnist-sample"
    """Data set."""
    data_root: Path | None = None
    """Where the data set lies."""
    photos: Photos = field(default_factory=Photos)
    split: str = "test"
    """train, val or test."""
    images: int = 50
    """How many images, a stratified sample."""
    gradient: str | None = None
    """How the attacks differentiate the defense; the strongest that fits if not given."""
    norm: str = "Linf"
    """Linf, L2 or L1."""
    eps: float | None = None
    """Largest perturbation, in [0, 1] pixel units; the data set's custom if not given."""
    steps: int = 20
    """Steps of each attack by gradient."""
    replicates: int = 4
    """Attack replicates of a step."""
    many: int = 64
    """Attack replicates of the attack that averages more noise away."""
    draws: int = 32
    """Fresh replicates that judge."""
    larger: tuple[float, ...] = (2.0, 3.0, 5.0)
    """Multiples of eps, at the last of which accuracy must have reached chance."""
    queries: int = 200
    """Square's queries an image."""
    tries: int = 10
    """Random perturbations an image, of which the worst counts."""
    device: Device = "auto"
    """Where to compute."""
    seed: int = 0
    """Seed of every stream."""

    def run(self) -> int:
        """Attack, judge, write the page; 1 if a check failed."""
        eps = dataset(self.data).eps if self.eps is None else self.eps
        settings = AuditSettings(
            threat=ThreatModel(norm=self.norm, eps=eps),
            steps=self.steps,
            replicates=self.replicates,
            many=self.many,
            draws=self.draws,
            larger=self.larger,
            queries=self.queries,
            tries=self.tries,
            seed=self.seed,
        )
        device = resolve_device(self.device)
        defense = put_on(load_defense(self.defense, seed=self.seed), device)
        source = self.photos.open(self.data, self.split, self.data_root, wanted_by(defense))
        images, labels = (part.to(device) for part in source.take(self.images))
        other = self.transfer_from and put_on(load_defense(self.transfer_from), device)
        chosen = self.gradient and make_gradient(self.gradient)
        gradient = chosen or fitting_gradient(defense, images)
        out = writable_folder(self.out)
        found = audit(defense, images, labels, gradient, settings, other or None)
        checks = verdicts(found)
        text = audit_text(self.defense, checks, found, settings)
        write_text(out / PAGE, text)
        draw_audit(self.defense, found, out / PICTURE)
        print(f"{text}\nThe page is {out / PAGE}")
        return 0 if all(check.passed for check in checks) else 1
