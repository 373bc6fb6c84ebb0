"""`ebm-defense diagnose`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import tomli_w
import torch
import tyro

from ebm_defense.attacks import PGD, ThreatModel
from ebm_defense.commands.options.photos import Photos, wanted_by
from ebm_defense.commands.options.shared import Device, Fraction, resolve_device
from ebm_defense.commands.options.subject import Subject, subject_of
from ebm_defense.data import customary_eps
from ebm_defense.errors import UsageError
from ebm_defense.eval.purification_curve import Point, purification_curve, recommend
from ebm_defense.eval.reporting.figures.diagnosis import Diagnosis, draw_diagnosis
from ebm_defense.langevin import LangevinSettings
from ebm_defense.learning.diagnosis.convergence import (
    METASTABLE,
    TIMES,
    judge_convergence,
    kept_classes,
    long_runs,
)
from ebm_defense.learning.diagnosis.diagnostics import Signs, signs_of
from ebm_defense.noise import KeyedNoise, chain_keys
from ebm_defense.purifiers.langevin import LangevinPurifier
from ebm_defense.storage.files import writable_folder, write_text
from ebm_defense.storage.weights import load_defense

PAGE, FOUND = "diagnosis.png", "diagnosis.toml"


APART = 2.0
"""How many times longer or shorter than a chain of learning lives a purification may be."""


@dataclass(frozen=True, kw_only=True)
class Diagnose:
    """Say whether an energy's chains converge, and by how many steps to purify.

    Long chains from data and from noise, their energies, R-hat and effective sample size, and
    where they leave the data; accuracy on clean and on attacked images and compression against
    the number of steps. Prints one verdict, and writes a page of pictures and the numbers.
    """

    energy: Annotated[str, tyro.conf.Positional]
    """A shipped defense or energy, a defense folder, or the folder that train-ebm wrote."""
    out: Path = Path("diagnosis")
    """Folder for the page and the numbers."""
    classifier: str = "fashion-mnist"
    """The defense whose undefended classifier tells classes."""
    data: str = "fashion-mnist-sample"
    """Data set."""
    data_root: Path | None = None
    """Where the data set lies."""
    photos: Photos = field(default_factory=Photos)
    images: int = 32
    """Chains from data, and as many from noise; a stratified sample of test images."""
    steps: int = 10_000
    """Langevin steps of the chains."""
    curve_steps: int | None = None
    """Longest chain of the purification curve; as --steps if not given."""
    precision: str = "fp32"
    """Precision of the energy's inner activations: fp32, bf16, or fastest (bf16 where native)."""
    adjusted: bool = False
    """Let a Metropolis test accept or refuse each step (MALA), and say how many it does."""
    learned_steps: int | None = None
    """How long a chain lives in learning, K/p; read off the folder of train-ebm if not given, else
    the steps of the defense."""
    data_noise: float | None = None
    """Noise on data in learning, in [-1, 1] units; read off the folder of train-ebm, else twice the
    chain's step size, as is usual."""
    eps: Fraction | None = None
    """Largest perturbation of the attacked images, Linf in [0, 1] units; the data set's custom."""
    attack_steps: int = 40
    """Steps of the PGD that attacks the classifier alone."""
    device: Device = "auto"
    """Where to compute."""
    seed: int = 0
    """Seed of every draw."""

    def run(self) -> int:
        """Run the chains, judge, draw, print."""
        subject, device = self._subject(), resolve_device(self.device)
        wanted = wanted_by(LangevinPurifier(subject.energy))
        source = self.photos.open(self.data, "test", self.data_root, wanted)
        images, labels = (part.to(device) for part in source.take(self.images))
        out = writable_folder(self.out)
        settings = LangevinSettings(
            steps=self.steps,
            step_size=subject.langevin.step_size,
            temperature=subject.langevin.temperature,
            adjusted=self.adjusted or subject.langevin.adjusted,
        )
        energy = subject.energy.to(device)
        chains = long_runs(
            energy,
            images * 2 - 1,
            settings,
            data_noise=subject.data_noise,
            seed=self.seed,
            precision=self.precision,
        )
        found = judge_convergence(chains, learned_steps=subject.learned_steps)
        classifier = load_defense(self.classifier).undefended.to(device)
        kept = kept_classes(classifier, chains, images)
        purifier = LangevinPurifier(energy, **asdict(settings), precision=self.precision)
        points = self._curve(purifier, classifier, images, labels)
        shown = Diagnosis(found, chains, kept, points, subject.history)
        draw_diagnosis(shown, out / PAGE)
        self._keep(out, shown, subject)
        print(_text(shown, subject))
        print(f"page and numbers are in {out}")
        return 0

    def _curve(
        self,
        purifier: LangevinPurifier,
        classifier: torch.nn.Module,
        images: torch.Tensor,
        labels: torch.Tensor,
    ) -> list[Point]:
        eps = customary_eps(self.data, "Linf") if self.eps is None else self.eps
        threat = ThreatModel(eps=eps)
        attack = PGD(threat=threat, steps=self.attack_steps, step_size=eps / 4)
        attacked = attack(classifier, images, labels, seed=self.seed)
        keys = chain_keys(self.seed, "at random", range(len(images)), range(1))[0]
        direction = KeyedNoise(keys.to(images.device)).normal(0, images)
        wandered = threat.step(images, images, direction, eps)
        longest = self.steps if self.curve_steps is None else self.curve_steps
        lengths = sorted({0, *np.geomspace(1, max(longest, 1), 14).round().astype(int).tolist()})
        return purification_curve(
            purifier, classifier, images, attacked, labels,
            lengths=lengths, wandered=wandered, seed=self.seed,
        )  # fmt: skip

    def _subject(self) -> Subject:
        subject = subject_of(self.energy)
        if self.learned_steps is not None:
            subject = subject._replace(learned_steps=self.learned_steps)
        if self.data_noise is not None:
            subject = subject._replace(data_noise=self.data_noise)
        if self.steps < subject.learned_steps:
            raise UsageError(
                f"--steps {self.steps} says nothing of chains that live {subject.learned_steps} "
                f"steps; give {TIMES * subject.learned_steps} or more."
            )
        return subject

    def _keep(self, out: Path, shown: Diagnosis, subject: Subject) -> None:
        steps, reason = recommend(shown.points)
        plain = {
            "energy": self.energy,
            "steps": self.steps,
            "learned_steps": subject.learned_steps,
            "images": self.images,
            "seed": self.seed,
            "convergence": {k: v for k, v in asdict(shown.found).items() if v is not None},
            "kept": {"steps": list(shown.chains.steps), "classes": list(shown.kept)},
            "recommended": {"steps": steps, "reason": reason},
            "curve": [p._asdict() for p in shown.points],
        }
        if (signs := _signs(subject)) is not None:
            plain["learning"] = signs._asdict()
        write_text(out / FOUND, tomli_w.dumps(plain))


def _signs(subject: Subject) -> Signs | None:
    curves = subject.history
    if curves is None or not len(curves):
        return None
    return signs_of(curves["d_s"].tolist(), curves["r_s"].tolist())


def _text(shown: Diagnosis, subject: Subject) -> str:
    found, points = shown.found, shown.points
    steps, reason = recommend(points)
    rows = pd.DataFrame(
        {
            "steps": [p.steps for p in points],
            "clean %": [100 * p.clean for p in points],
            "attacked %": [100 * p.attacked for p in points],
            "compression": [p.compression for p in points],
            "at random": [p.at_random for p in points],
        }
    )
    share = found.acceptance
    accepted = "" if share is None else f"; {share:.1%} of steps are accepted"
    until = f" until about step {found.until}" if found.verdict == METASTABLE else ""
    return "\n".join(
        [
            f"verdict: {found.verdict}{until}: {found.reason}",
            f"drift {found.drift:+.2f} standard deviations of the data's energies, pixels out of "
            f"range {found.saturation:.1%}, R-hat {found.rhat:.2f}, effective sample size "
            f"{found.ess_bulk:.0f} (bulk), {found.ess_tail:.0f} (tail){accepted}",
            f"after {shown.chains.steps[-1]} steps {shown.kept[-1]:.1%} of the chains from data "
            "keep their image's class",
            *_learning(subject),
            "",
            rows.to_string(index=False, float_format="%.3g"),
            "",
            f"purify by {steps} steps: {reason}",
            *_lifetime(steps, subject),
        ]
    )


def _learning(subject: Subject) -> list[str]:
    signs = _signs(subject)
    if signs is None:
        return []
    swings = "it oscillates" if signs.oscillates else "it does not oscillate"
    return [
        f"in learning's second half d_s is {signs.mean:+.2f} ± {signs.swing:.2f}, after one update "
        f"correlated by {signs.after_one:+.2f} ({swings}), r_s {signs.strength:.3f}"
    ]


def _lifetime(steps: int, subject: Subject) -> list[str]:
    """Compare the recommended length with what chains lived in learning."""
    lived = subject.learned_steps
    if subject.history is None or lived / APART <= steps <= lived * APART:
        return []
    how = "longer" if steps > lived else "shorter"
    return [
        f"warning: chains lived {lived} steps in learning, far {how} ones purify; an energy is "
        "known to hold for as long as its chains lived"
    ]
