"""`ebm-defense signal`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ebm_defense.attacks import CrossEntropy, make_gradient
from ebm_defense.attacks.gradients.snr import Signal, eot_signal
from ebm_defense.commands.options.photos import Photos, wanted_by
from ebm_defense.commands.options.shared import Device, make_purifier, put_on, resolve_device
from ebm_defense.defense import PurifiedClassifier
from ebm_defense.eval.judging.check_model import check_model
from ebm_defense.eval.reporting.renderers import RENDERERS
from ebm_defense.eval.reporting.table import Cell, Column, Table
from ebm_defense.storage.weights import load_defense


@dataclass(frozen=True, kw_only=True)
class SignalCommand:
    """Show how many replicates an attack needs: the signal in its gradient against their number.

    At each number, two gradients on independent noise are compared on every image. A cosine near 1
    says that more replicates would not change the attack's direction; one near 0, that the attack
    walks at random.
    """

    defense: str = "fashion-mnist"
    """A shipped defense or a folder."""
    data: str = "fashion-mnist-sample"
    """Data set."""
    data_root: Path | None = None
    """Where the data set lies."""
    photos: Photos = field(default_factory=Photos)
    split: str = "test"
    """train, val or test."""
    images: int = 8
    """How many images, a stratified sample."""
    gradient: str = "bpda"
    """bpda, full, smoothed or surrogate, with settings as in smoothed(width=0.3, stride=4)."""
    average: str = "logits"
    """What the cross-entropy averages over replicates: logits, softmax or log_softmax."""
    replicates: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    """Numbers of replicates to compare."""
    langevin_steps: int | None = None
    """Langevin steps K, instead of the defense's own."""
    purifier: str | None = None
    """Another purifier: a shipped name, a folder, gaussian:0.25 or package.module:factory."""
    max_chains: int | None = None
    """Chains that run at a time, which bounds memory; if not given, 400 on a CPU and as many as
    fit on a GPU."""
    device: Device = "auto"
    """Where to compute."""
    seed: int = 0
    """Seed of the noise."""

    def run(self) -> int:
        """Measure and print the table."""
        gradient, loss = make_gradient(self.gradient), CrossEntropy(average=self.average)
        device = resolve_device(self.device)
        defense = put_on(self._defense(), device)
        source = self.photos.open(self.data, self.split, self.data_root, wanted_by(defense))
        images, labels = (part.to(device) for part in source.take(self.images))
        check_model(defense, images, labels)
        rows = eot_signal(
            defense,
            images,
            labels,
            gradient=gradient,
            loss=loss,
            replicates=self.replicates,
            seed=self.seed,
        )
        steps = gradient.chain_steps(defense)
        print(f"{gradient.name} gradient of {len(labels)} images, {steps} chain-steps a replicate")
        print(table(rows), end="")
        return 0

    def _defense(self) -> PurifiedClassifier:
        chain = {"steps": self.langevin_steps}
        defense = load_defense(self.defense, max_chains=self.max_chains, **chain)
        if self.purifier is not None:
            defense.purifier = make_purifier(self.purifier, self.langevin_steps)
        return defense


def table(rows: list[Signal]) -> str:
    """Return the rows as plain text, one a line."""
    head = ("replicates", "cosine", "lowest tenth", "signal-to-noise")
    numbers = (
        (f"{row.replicates}", f"{row.cosine:.3f}", f"{row.low:.3f}", f"{row.ratio:.2f}")
        for row in rows
    )
    return RENDERERS["text"](
        Table(
            columns=tuple(Column(title, "r") for title in head),
            rows=tuple(tuple(map(Cell, row)) for row in numbers),
        )
    )
