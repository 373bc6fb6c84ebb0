"""`ebm-defense rank-attacks`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from ebm_defense.attacks import ThreatModel
from ebm_defense.attacks.norms import norm_name
from ebm_defense.commands.options.photos import Photos, wanted_by
from ebm_defense.commands.options.shared import (
    Device,
    Fraction,
    make_purifier,
    put_on,
    resolve_device,
    write_settings,
)
from ebm_defense.data import customary_eps
from ebm_defense.defense import PurifiedClassifier
from ebm_defense.errors import UsageError
from ebm_defense.eval.ranking import Contest, Field, Outcome, compete, ranking
from ebm_defense.eval.reporting.renderers import RENDERERS
from ebm_defense.eval.reporting.table import percent, plain_table
from ebm_defense.purifiers.registry import caption
from ebm_defense.storage.files import writable_folder, write_text
from ebm_defense.storage.weights import load_defense

ROUND, SHORTER = "bpda", 10
"""The gradient around the purifier; the steps of the surrogates that are tried."""


@dataclass(frozen=True, kw_only=True)
class RankAttacks:
    """Run every attack on a defense, each judged alone, and rank them by what they leave standing.

    The dearer an attack, the fewer images it gets: always the first ones of the same sample.
    Writes ranking.md, ranking.csv and a run folder an attack into OUT; a run cut short goes on.
    """

    out: Path
    """Folder for everything."""
    defense: str = "fashion-mnist"
    """A shipped defense or a folder."""
    purifier: str | None = None
    """Another purifier: a shipped name, a folder, none, gaussian:0.25, jpeg:75, bits:3, tv:0.1,
    median:3, "diffusion:FOLDER(start=200, steps=20)" or package.module:factory."""
    data: str = "fashion-mnist-sample"
    """Data set."""
    data_root: Path | None = None
    """Where the data set lies."""
    photos: Photos = field(default_factory=Photos)
    split: str = "test"
    """train, val or test."""
    images: tuple[int, int, int] = (200, 64, 32)
    """How many images the cheap attacks, those by gradient, and the dear ones get."""
    norm: str = "Linf"
    """Linf, L2 or L1."""
    eps: Fraction | None = None
    """Largest perturbation, in [0, 1] pixel units; the data set's custom if not given."""
    steps: int = 20
    """Attack steps."""
    replicates: int = 8
    """Attack replicates."""
    judge_replicates: int = 64
    """Fresh replicates of a judgement."""
    gradient: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A gradient beside bpda; those that fit the purifier if none is given."""
    also: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """One more attack, by name: "foolbox:LinfPGD(steps=40)"."""
    only: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Only attacks whose names begin so, and the first, beside which all are shown."""
    max_chains: int | None = None
    """Chains that run at a time; as many as fit if not given."""
    device: Device = "auto"
    """Where to compute."""
    seed: int = 0
    """Seed of every stream."""

    def run(self) -> int:
        """Run, print a line as soon as it is there, and keep the table."""
        out, device = writable_folder(self.out), resolve_device(self.device)
        defense = put_on(self._defense(), device)
        source = self.photos.open(self.data, self.split, self.data_root, wanted_by(defense))
        images, labels = (part.to(device) for part in source.take(max(self.images)))
        contests = self._contests(self.gradient or fitting(defense, images))
        found: list[Outcome] = []
        for outcome in compete(
            defense, images, labels, contests,
            threat=self._threat(), judge_replicates=self.judge_replicates, seed=self.seed, out=out,
        ):  # fmt: skip
            found.append(outcome)
            left = f"{percent(outcome.stands.mean())}% of {len(outcome.stands)} images stand"
            print(f"{outcome.attack}: {left}, {outcome.seconds:.0f} s", flush=True)
        self._keep(out, found, self._caption(defense, images))
        return 0

    def _defense(self) -> PurifiedClassifier:
        defense = load_defense(self.defense, max_chains=self.max_chains, seed=0)
        if self.purifier is None:
            return defense
        purifier = make_purifier(self.purifier)
        return PurifiedClassifier(defense.undefended, purifier, max_chains=self.max_chains, seed=0)

    def _threat(self) -> ThreatModel:
        eps = customary_eps(self.data, norm_name(self.norm)) if self.eps is None else self.eps
        return ThreatModel(norm=self.norm, eps=eps)

    def _contests(self, gradients: tuple[str, ...]) -> list[Contest]:
        """Return the attacks that are asked for; the first always."""
        field = Field(
            gradients=gradients,
            steps=self.steps,
            replicates=self.replicates,
            images=self.images,
            also=self.also,
        )
        first, *others = field.contests()
        wanted = [c for c in others if c.attack.startswith(self.only or ("",))]
        if self.only and not wanted:
            raise UsageError(f"no attack's name begins with {' or '.join(self.only)}.")
        return [first, *wanted]

    def _caption(self, defense: PurifiedClassifier, images: Any) -> str:
        purifier = caption(defense.purifier.record(images))
        return (
            f"{self.defense}, {self.data}, {self.split} images, {self._threat()}; steps and attack "
            f"replicates as each row says; judged on {self.judge_replicates} fresh replicates "
            f"of one selected image each, as deployed; purifier: {purifier}; 95% Wilson "
            f"intervals; seed {self.seed}. Costs are as spent: an image that is surely broken "
            "costs no more."
        )

    def _keep(self, out: Path, found: list[Outcome], caption: str) -> None:
        table = plain_table(ranking(found), notes=(caption,))
        text = RENDERERS["markdown"](table)
        write_text(out / "ranking.md", text)
        write_text(out / "ranking.csv", RENDERERS["csv"](table))
        write_settings(out, self)
        print(f"\n{text}\nranking.md and ranking.csv are in {out}")


def fitting(defense: PurifiedClassifier, images: Any) -> tuple[str, ...]:
    """Return the gradients through a purifier by name, and those through a shorter relative."""
    through = [g for g in defense.purifier.gradients(images[:1]) if g != ROUND]
    long = defense.purifier.chain_steps > SHORTER
    shorter = [f"surrogate(steps={SHORTER}, through={g}())" for g in through if long]
    return (*through, *shorter)
