"""`ebm-defense landscape`."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tomli_w
import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from ebm_defense.commands.options.photos import Photos, wanted_by
from ebm_defense.commands.options.shared import Device, resolve_device
from ebm_defense.commands.options.subject import Subject, subject_of
from ebm_defense.errors import UsageError
from ebm_defense.eval.mixing import Mixing, class_mixing, starts_to_mix
from ebm_defense.eval.reporting.figures.landscape import draw_landscape
from ebm_defense.landscape import Attraction, Landscape, explore
from ebm_defense.purifiers.langevin import LangevinPurifier
from ebm_defense.storage.files import save_tensors, writable_folder, write_text
from ebm_defense.storage.folders import names_folder
from ebm_defense.storage.weights import load_defense

PICTURE, FOUND, MINIMA = "landscape.png", "landscape.toml", "minima.safetensors"
BOUND = 1.0
"""Images lie in [-1, 1], and so do the minima that are looked for."""


@dataclass(frozen=True, kw_only=True)
class LandscapeCommand:
    """Map an energy's basins by attraction-diffusion, and say when its chains mix classes.

    Images descend to minima. Between each two a chain goes whose target attracts it; minima that
    it reaches both ways share a metastable basin. Its path is then pulled taut, and the highest U
    on it is the barrier. Writes the tree as a picture, with images at its leaves, and the numbers.
    """

    energy: Annotated[str, tyro.conf.Positional]
    """A shipped defense, a defense folder, or the folder that train-ebm wrote."""
    out: Path = Path("landscape")
    """Folder for the picture and the numbers."""
    classifier: str | None = None
    """The defense whose classifier tells the classes of images with the chain's noise on them; if
    not given the energy's own, or fashion-mnist's undefended one for an energy alone."""
    data: str = "fashion-mnist-sample"
    """Data set."""
    data_root: Path | None = None
    """Where the data set lies."""
    photos: Photos = field(default_factory=Photos)
    images: int = 10
    """Images whose minima are mapped, a stratified sample; chains grow with the square of it."""
    descent: int = 200
    """Gradient steps to a minimum."""
    alpha: float = 60.0
    """Attraction, beside U/T: the stronger, the more minima share a basin."""
    reach: float = 6.0
    """Distance from its target at which a chain has come there, in [-1, 1] units; more than the
    noise of chains at this temperature spreads an image, or none comes."""
    apart: float = 1.0
    """Minima nearer to each other are one."""
    step_size: float = 0.04
    """Step size of the chains."""
    temperature: float | None = None
    """Temperature T; the energy's own if not given."""
    patience: int = 60
    """Steps without coming nearer after which a chain has not come there."""
    most: int = 300
    """Steps after which it has not either."""
    pulls: int = 20
    """Steps in which paths are pulled taut."""
    trials: int = 1
    """Chains between each two minima, each way."""
    mixing_images: int = 50
    """Images whose classes are followed along chains of the energy's own settings."""
    mixing_steps: int = 1_000
    """The longest of those chains."""
    device: Device = "auto"
    """Where to compute."""
    seed: int = 0
    """Seed of every draw."""

    def run(self) -> int:
        """Find minima, cross barriers, follow classes, draw, print."""
        subject, device = subject_of(self.energy), resolve_device(self.device)
        if self.images < 2 or self.mixing_steps < 1:
            raise UsageError("a landscape needs 2 images or more, and mixing a step or more.")
        energy = subject.energy.to(device)
        source = self.photos.open(
            self.data, "test", self.data_root, wanted_by(LangevinPurifier(energy))
        )
        out = writable_folder(self.out)
        images = source.take(self.images).images.to(device)
        followed = source.take(min(self.mixing_images, len(source.labels))).images.to(device)
        classifier = self._classifier().to(device)
        settings = self._attraction(subject)
        with tqdm(total=1.0, desc="chains", bar_format="{l_bar}{bar}") as bar:
            found = explore(
                energy, images * 2 - 1, settings, descent=self.descent, rate=1.0,
                apart=self.apart, pulls=self.pulls, trials=self.trials, seed=self.seed,
                progress=lambda share: bar.update(share - bar.n),
            )  # fmt: skip
        mixing = self._mixing(subject, classifier, followed)
        names = self._names(found, classifier, source.classes)
        self._keep(out, found, mixing, settings, names)
        draw_landscape(
            found, (found.minima + 1) / 2, names, mixing, source.classes, out / PICTURE,
            scale=settings.temperature, title=_title(found, settings),
        )  # fmt: skip
        print(_text(found, mixing, source.classes, settings, names))
        print(f"picture and numbers are in {out}")
        return 0

    def _classifier(self) -> torch.nn.Module:
        """Return what tells classes: as a rule a classifier that knows what chains leave."""
        if self.classifier is not None or names_folder(self.energy):
            return load_defense(self.classifier or self.energy).classifier
        return load_defense("fashion-mnist").undefended

    def _attraction(self, subject: Subject) -> Attraction:
        own = subject.langevin.temperature
        return Attraction(
            temperature=own if self.temperature is None else self.temperature,
            alpha=self.alpha,
            step_size=self.step_size,
            reach=self.reach,
            patience=self.patience,
            most=self.most,
            bound=BOUND,
        )

    def _mixing(
        self, subject: Subject, classifier: torch.nn.Module, images: Tensor
    ) -> list[Mixing]:
        lengths = {0, *np.geomspace(1, self.mixing_steps, 12).round().astype(int).tolist()}
        chain = asdict(subject.langevin) | {"steps": self.mixing_steps}
        purifier = LangevinPurifier(subject.energy, **chain, precision="fp32")
        return class_mixing(purifier, classifier, images, lengths=sorted(lengths), seed=self.seed)

    def _names(
        self, found: Landscape, classifier: torch.nn.Module, classes: tuple[str, ...]
    ) -> list[str]:
        """Return each minimum's class, as the classifier sees it."""
        with torch.no_grad():
            seen = classifier((found.minima + 1) / 2).argmax(-1).tolist()
        return [classes[k] if k < len(classes) else str(k) for k in seen]

    def _keep(
        self,
        out: Path,
        found: Landscape,
        mixing: list[Mixing],
        settings: Attraction,
        names: list[str],
    ) -> None:
        t = settings.temperature
        plain: dict[str, Any] = {
            "energy": self.energy,
            "images": self.images,
            "seed": self.seed,
            "attraction": asdict(settings),
            "minimum_of_image": found.start.tolist(),
            "classes": names,
            "energies": (found.energies / t).tolist(),
            "barriers": (found.barriers / t).tolist(),
            "crossed": found.crossed.tolist(),
            "basins": found.basins,
            "tree": [m._asdict() | {"barrier": m.barrier / t} for m in found.tree()],
            "mixing": [_plain(m) for m in mixing],
        }
        write_text(out / FOUND, tomli_w.dumps(plain))
        save_tensors(out / MINIMA, {"minima": found.minima})


def _plain(m: Mixing) -> dict[str, Any]:
    moves = [[a, b, n] for (a, b), n in m.moves.items()]
    return {"steps": m.steps, "moved": m.moved.value, "low": m.moved.low, "high": m.moved.high,
            "moves": moves}  # fmt: skip


def _title(found: Landscape, settings: Attraction) -> str:
    return (
        f"{len(found.minima)} minima in {len(found.basins)} metastable basins at T = "
        f"{settings.temperature:g}, α = {settings.alpha:g}"
    )


def _text(
    found: Landscape,
    mixing: list[Mixing],
    classes: tuple[str, ...],
    settings: Attraction,
    names: list[str],
) -> str:
    lines = [_title(found, settings) + ":"]
    lines += [f"  basin {k + 1}: {', '.join(names[i] for i in basin)}"
              for k, basin in enumerate(found.basins)]  # fmt: skip
    finite = [m.barrier for m in found.tree() if math.isfinite(m.barrier)]
    if finite:
        low = float(found.energies.min())
        heights = [(b - low) / settings.temperature for b in (min(finite), max(finite))]
        lines.append(
            f"barriers of the tree: {heights[0]:.0f} to {heights[1]:.0f} T above the lowest minimum"
        )
    return "\n".join([*lines, _said(mixing, classes)])


def _said(mixing: list[Mixing], classes: tuple[str, ...]) -> str:
    """Say from which number of steps on classes mix, and which do."""
    first, last = starts_to_mix(mixing), mixing[-1]
    if first is None:
        return (
            f"no classes mix up to K = {last.steps}: {last.moved.value:.1%} of chains have left "
            "their class"
        )
    named = ", ".join(
        f"{classes[a]} to {classes[b]} ({n})" for (a, b), n in list(first.moves.items())[:4]
    )
    return (
        f"classes start to mix at K = {first.steps}: {first.moved.value:.1%} "
        f"({first.moved.low:.1%} to {first.moved.high:.1%}) of chains have left their class; "
        f"mostly {named}"
    )
