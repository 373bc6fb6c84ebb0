"""`ebm-defense evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import nn

from ebm_defense.attacks.gradients.registry import choose_auto
from ebm_defense.attacks.norms import norm_name
from ebm_defense.commands.options.factories import make_module, scaled_classifier
from ebm_defense.commands.options.photos import Photos, wanted_by
from ebm_defense.commands.options.shared import (
    Device,
    Fraction,
    make_purifier,
    put_on,
    resolve_device,
    write_settings,
)
from ebm_defense.commands.options.sweep import grid
from ebm_defense.data import customary_eps
from ebm_defense.defense import PurifiedClassifier
from ebm_defense.errors import UsageError
from ebm_defense.eval import Protocol, Report, evaluate, get_protocol, load_protocol
from ebm_defense.eval.load_run import load_run
from ebm_defense.eval.protocols.overrides import override
from ebm_defense.eval.reporting.captions import attack_caption
from ebm_defense.eval.reporting.compare import compare
from ebm_defense.eval.reporting.figures.pictures import draw_strip, purification_rows
from ebm_defense.eval.running.job import Job
from ebm_defense.eval.running.workers import Workers
from ebm_defense.eval.speed.forecast import forecast
from ebm_defense.eval.storage.columns import attack_column
from ebm_defense.eval.storage.settings import default_folder
from ebm_defense.langevin import LangevinSettings
from ebm_defense.purifiers.base import Purifier
from ebm_defense.purifiers.langevin import LangevinPurifier
from ebm_defense.storage.weights import load_defense

COMMAND, UNDEFENDED = "command.toml", "undefended"
ALONE_SHARD = "1/1"
PICTURED = 8


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Attack a defense, judge it on fresh random draws, and print the table.

    With no options: the shipped Fashion-MNIST defense, on images that ship with it. Numbers that
    are not given come from the protocol, and eps from the data set's custom.
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
    images: int = 40
    """How many images, a stratified sample."""
    protocol: str = "quick"
    """quick, hill2021, lifecycle2022, mefa2026, standard, or a protocol's TOML file."""
    norm: str | None = None
    """Linf, L2 or L1."""
    eps: Fraction | None = None
    """Largest perturbation, in [0, 1] pixel units, as 0.03 or 8/255; the data set's custom in this
    norm if not given."""
    bits: int | None = None
    """Attack on the lattice of images of so many bits a pixel: 8 for what a PNG can hold."""
    looks: str | None = None
    """Which images of an attack are judged: selected (the strongest, once), every or last."""
    steps: int | None = None
    """Attack steps."""
    step_size: Fraction | None = None
    """Attack step, in [0, 1] units; eps/4 if not given."""
    replicates: int | None = None
    """Attack replicates."""
    judge_replicates: int | None = None
    """Fresh replicates of a judgement, and of clean accuracy."""
    selection_replicates: int | None = None
    """Fresh replicates by which the image that is judged is selected from an attack's strongest."""
    attack: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Instead of the protocol's attacks one that `ebm-defense attacks` lists: bpda, pgd(steps=20),
    "foolbox:L2DeepFoolAttack(steps=10)"; may be given several times."""
    gradient: str | None = None
    """How the attacks that take a gradient differentiate the defense."""
    loss: str | None = None
    """What the attacks that take a loss maximise."""
    transfer_from: str | None = None
    """Run the transfer of another defense's images, a shipped name or a folder."""
    verdict: str | None = None
    """How images are judged: as-deployed, one-stage or sequential, each on one selected image; or
    two-stage, on an attack's every look."""
    alpha: float | None = None
    """Error level of the sequential verdict."""
    langevin_steps: int | None = None
    """Langevin steps K, instead of the defense's own."""
    precision: str = "auto"
    """Precision of the chains' inner activations: auto, fp32 or bf16."""
    verdict_precision: str = "auto"
    """Precision of the classifier where the judge asks it: auto, fp32 or bf16; attacks get fp32."""
    average: str | None = None
    """How replicates are averaged: logits, softmax, log_softmax or votes."""
    classifier: str | None = None
    """Another classifier: undefended, which the defense keeps beside its own, or one of yours,
    package.module:factory or package.module:factory(argument=value), [0, 1] images to logits."""
    classifier_weights: Path | None = None
    """Its weights: a state_dict, bare or in what surrounds it, or FILE:NAME of one of several."""
    mean: tuple[float, ...] | None = None
    """Mean of your classifier's normalisation, one number or one a channel, in [0, 1] units; as
    timm says of its models if not given, else none."""
    std: tuple[float, ...] | None = None
    """Its standard deviation."""
    size: int | None = None
    """Height and width that your classifier wants, if not the images' own."""
    energy: str | None = None
    """An energy of your own: package.module:factory, [N, C, H, W] in [-1, 1] to [N]."""
    energy_weights: Path | None = None
    """Its state_dict."""
    langevin_step_size: float = 0.01
    """Step size of the chain on --energy."""
    temperature: float = 5e-5
    """Temperature of the chain on --energy."""
    adjusted: bool = False
    """Let a Metropolis test accept or refuse each Langevin step (MALA)."""
    purifier: str | None = None
    """Another purifier: a shipped name, a folder, none, gaussian:0.25, jpeg:75, bits:3, tv:0.1,
    median:3, hat:FOLDER, gebm:FOLDER, latent:FOLDER, pair:FOLDER, attributes:FOLDER,
    "diffusion:FOLDER(start=200, steps=20)" or package.module:factory."""
    max_chains: int | None = None
    """Chains that run at a time, which bounds memory; if not given, 400 on a CPU and as many as
    fit on a GPU."""
    device: Device = "auto"
    """Where to compute."""
    seed: int = 0
    """Seed of every stream."""
    out: Path | None = None
    """Run folder; the same command goes on in it. A new one under runs/ if not given."""
    shard: str = ALONE_SHARD
    """Do only this part of the run, as in 2/3; ebm-defense merge puts the folders together."""
    sweep: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Run a grid, as in --sweep eps=0.02,0.1 --sweep langevin-steps=0,50: each point in a folder of
    its own in --out, and a comparison of all."""
    dry_run: bool = False
    """Print chain-steps, expected hours and memory, and stop."""

    def run(self) -> int:
        """Evaluate, draw, print."""
        return self._sweep() if self.sweep else self._one()

    def _one(self) -> int:
        device = resolve_device(self.device)
        defense = put_on(self.make_defense(), device)
        wanted = wanted_by(defense)
        source = self.photos.open(self.data, self.split, self.data_root, wanted)
        images, labels = (part.to(device) for part in source.take(self.images))
        protocol = self._protocol()
        if self.dry_run:
            chosen = choose_auto(protocol, defense, images)
            job = Job(
                defense=defense, images=images, labels=labels, protocol=chosen, seed=self.seed
            )
            print(forecast(job))
            return 0
        workers, out = Workers.of(self.shard), self._out()
        report = evaluate(
            defense, images, labels, protocol, seed=self.seed, out=out, workers=workers
        )
        if workers.leads:
            write_settings(out, self, COMMAND)
            draw_breaks(defense, report, out / "purification.png", source.classes)
            print(f"\n{report.to_text()}\nEverything was saved in {out}")
        return 0

    def _sweep(self) -> int:
        """Run every point of the grid, and compare them."""
        out = self._out()
        points = grid(self.sweep, type(self))
        for name, values in points.items():
            print(f"{name}:", flush=True)
            replace(self, sweep=(), out=out / name, **values).run()
        if Workers.of(self.shard).leads and not self.dry_run and self.shard == ALONE_SHARD:
            reports = [load_run(out / name) for name in points]
            comparison = compare(reports, heading="settings", sweep=True)
            print(f"\n{comparison.to_text()}\nTable and figures are in {comparison.save(out)}")
        return 0

    def _out(self) -> Path:
        if self.out is None and Workers.of().world > 1:
            raise UsageError("processes that share a run need its folder's name; give --out.")
        return self.out or default_folder()

    def _protocol(self) -> Protocol:
        budget: dict[str, Any] = {
            "norm": self.norm,
            "eps": self.eps,
            "bits": self.bits,
            "looks": self.looks,
            "steps": self.steps,
            "step_size": self.step_size,
            "replicates": self.replicates,
            "judge_replicates": self.judge_replicates,
            "selection_replicates": self.selection_replicates,
            "verdict": self.verdict,
            "alpha": self.alpha,
        }
        if self.protocol.endswith(".toml"):
            return self._from_file({k: v for k, v in budget.items() if v is not None})
        if self.eps is None:
            budget["eps"] = customary_eps(self.data, norm_name(self.norm or "Linf"))
        return override(
            get_protocol(self.protocol, **budget),
            self._chosen(),
            gradient=self.gradient,
            loss=self.loss,
            steps=self.steps,
            step_size=self.step_size,
            replicates=self.replicates,
        )

    def _chosen(self) -> tuple[str, ...]:
        transfers = () if self.transfer_from is None else (f"transfer:{self.transfer_from}",)
        return (*self.attack, *transfers)

    def _from_file(self, given: dict[str, Any]) -> Protocol:
        if given or self._chosen():
            raise UsageError(
                f"{self.protocol} says all of the protocol; write "
                f"{', '.join([*given, *['attack'] * bool(self._chosen())])} there instead."
            )
        return override(load_protocol(self.protocol), (), gradient=self.gradient, loss=self.loss)

    def make_defense(self) -> PurifiedClassifier:
        """Return the defense that the options name."""
        self._refuse_lone_weights()
        options: dict[str, Any] = {
            "max_chains": self.max_chains,
            "verdict_precision": self.verdict_precision,
        }
        if self.average is not None:
            options["average"] = self.average
        if (self.classifier, self.energy, self.purifier) == (None, None, None):
            return load_defense(
                self.defense,
                steps=self.langevin_steps,
                precision=self._chain_precision(),
                adjusted=self.adjusted or None,
                **options,
            )
        classifier, undefended = self._classifiers()
        return PurifiedClassifier(classifier, self._purifier(), undefended=undefended, **options)

    def _classifiers(self) -> tuple[nn.Module, nn.Module]:
        """Return the classifier behind the purifier, and the one that is shown as undefended."""
        if self.classifier not in (None, UNDEFENDED):
            own = make_module(self.classifier, self.classifier_weights, "classifier")
            scaled = scaled_classifier(own, self.mean, self.std, self.size)
            return scaled, scaled
        shipped = load_defense(self.defense)
        behind = shipped.classifier if self.classifier is None else shipped.undefended
        return behind, shipped.undefended

    def _refuse_lone_weights(self) -> None:
        own = {self.classifier_weights: self.classifier, self.energy_weights: self.energy}
        for weights, network in own.items():
            if weights is not None and ":" not in (network or ""):
                raise UsageError(
                    f"{weights} are weights of no network of yours; name the one that they are of "
                    "by its package.module:factory."
                )

    def _chain_precision(self) -> str | None:
        return None if self.precision == "auto" else self.precision

    def _purifier(self) -> Purifier:
        if self.energy is not None and self.purifier is not None:
            raise UsageError("give --energy or --purifier, not both.")
        if self.energy is None:
            return make_purifier(
                self.purifier or self.defense, self.langevin_steps, self.adjusted or None
            )
        steps = LangevinSettings().steps if self.langevin_steps is None else self.langevin_steps
        energy = make_module(self.energy, self.energy_weights, "energy")
        return LangevinPurifier(
            energy,
            steps,
            self.langevin_step_size,
            self.temperature,
            self.precision,
            adjusted=self.adjusted,
        )


def draw_breaks(
    defense: PurifiedClassifier,
    report: Report,
    path: Path,
    classes: Sequence[str] = (),
) -> None:
    """Draw the first attacked images on their way through the purifier."""
    number = len(report.protocol.attacks) - 1
    attack = report.protocol.attacks[number]
    attacked = report.adversarial[attack_column(number, attack)]
    # Images that were wrong from the start show no attack at work, so they come last.
    wrong = torch.tensor(report.natural().to_numpy(copy=True)) <= 0.5
    chosen = wrong.int().argsort(stable=True)[:PICTURED]
    device = next(defense.parameters(), attacked).device
    originals, adversarial = report.originals[chosen].to(device), attacked[chosen].to(device)
    draw_strip(
        purification_rows(defense, originals, adversarial, report.settings["seed"]),
        path,
        classify=defense.classify,
        labels=torch.tensor(report.records["label"])[chosen],
        classes=classes,
        title=attack_caption(attack),
    )
