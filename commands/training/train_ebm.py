"""`ebm-defense train-ebm`."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from torch import nn
from tqdm import tqdm

from ebm_defense.commands.options.photos import Photos
from ebm_defense.commands.options.resume import CHECKPOINT, checkpoint_of
from ebm_defense.commands.options.shared import Device, resolve_device, write_settings
from ebm_defense.energies.conv import ConvEnergySettings, channels_last
from ebm_defense.energies.over_prior import over
from ebm_defense.energies.registry import ENERGIES
from ebm_defense.energies.residual import ResidualEnergySettings
from ebm_defense.errors import UsageError
from ebm_defense.generators.networks import ConvGenerator, ConvSettings
from ebm_defense.generators.registry import GENERATORS
from ebm_defense.langevin import LangevinSettings
from ebm_defense.learning.diagnosis.diagnostics import draw_curves, long_chains, save_grid
from ebm_defense.learning.energies.recipe import EnergyRecipe
from ebm_defense.learning.energies.recipes import recipe_file
from ebm_defense.learning.energies.trainer import EnergyTrainer
from ebm_defense.learning.parallel import Team
from ebm_defense.storage.files import save_tensors, writable_folder, write_text
from ebm_defense.storage.folders import ENERGY, learned_folder, names_folder
from ebm_defense.storage.state_dicts import about, load_weights, refuse_other
from ebm_defense.storage.weights import load_energy, network_of

_log = logging.getLogger("ebm_defense.learning")

GENERATOR = "generator.safetensors"
APART = 2.0
"""How many times longer or shorter than a chain of learning lives a purification may be."""
PICTURED = 16

FIXED = {
    "data", "photos", "images", "network", "width", "activation", "init", "prior",
    "prior_temperature", "prior_spread", "objective", "start",
    "fresh", "bank", "batch", "burn_in", "generator", "seed",
}  # fmt: skip
"""Options that a checkpoint holds the outcome of."""

NETWORKS: dict[str, tuple[str, Callable[..., Any]]] = {
    "conv": ("ConvEnergy", ConvEnergySettings),
    "residual": ("ResidualEnergy", ResidualEnergySettings),
}
"""Energy networks by the names that options call them."""


@dataclass(frozen=True, kw_only=True)
class TrainEbm:
    """Learn an energy, usually by maximum likelihood, its chains begun as a recipe says.

    Writes energy.safetensors (the running average of the weights), checkpoint.pt, history.csv,
    settings.toml and pictures into OUT. Repeat the command with --resume to go on exactly;
    torchrun's processes share each batch and the bank of chains.
    """

    out: Path
    """Folder for everything."""
    recipe: str | None = None
    """What gives the options that are not given here: a recipe's name (shortrun, midrun, longrun,
    hill2021, anatomy, or an energy that ships), or a TOML file of options."""
    data: str = "fashion-mnist"
    """Data set whose training split is learned."""
    data_root: Path | None = None
    """Where the data set lies."""
    photos: Photos = field(default_factory=Photos)
    images: int | None = None
    """Learn from a stratified sample of this many images; all if not given."""
    network: str = "conv"
    """conv, the published network; or residual, SNGAN's discriminator without normalisation."""
    width: int = 32
    """Channels of the first layer (conv) or of every layer (residual)."""
    activation: str = "leaky_relu"
    """leaky_relu, relu, soft_lrelu, soft_lrelu:WIDTH, silu or softplus."""
    init: str | None = None
    """What to begin from, of the same network and width: a weight file, or the energy of a shipped
    name or folder."""
    prior: Path | None = None
    """energy.safetensors of an energy that lies beneath the one that is learned, and stays as it
    is; what is written is both."""
    prior_temperature: float | None = None
    """The temperature at which chains feel the prior; as --temperature if not given."""
    prior_spread: float | None = None
    """τ of a term ‖x‖²/(2τ²) beneath, in [-1, 1] units; none if not given."""
    updates: int = 10_000
    """Weight updates in all."""
    objective: str = "likelihood"
    """What moves the weights: likelihood; contrastive-divergence, whose chains begin at the batch;
    score-matching, without chains; or recovery-likelihood, whose chains begin at noisy images."""
    noise_levels: tuple[float, ...] = (0.1,)
    """Standard deviations of the noise that score-matching and recovery-likelihood undo, in
    [-1, 1] units."""
    loss_shape: float | Literal["adaptive"] = 2.0
    """Shape of Barron's robust loss in score-matching: 2 for half the square, 1 for a smooth
    absolute value, 0 for Cauchy's, or adaptive."""
    loss_scale: float = 1.0
    """Its scale, in standard deviations of the noise; where an adaptive one begins."""
    batch: int = 100
    """Data images, and chains, an update, of all processes together."""
    accumulate: int = 1
    """Cut each batch into so many parts, for the sake of memory; it changes nothing else."""
    start: str = "persistent"
    """Where chains begin an update: persistent (a bank, where they were left), burn-in (likewise,
    learned from after many visits only), noise, data, batch (its own images: contrastive
    divergence), generator, or cooperative (a generator that learns with the energy)."""
    fresh: str = "data"
    """Where the chains of a bank begin: noise, data, generator or cooperative."""
    bank: int = 10_000
    """Persistent chains."""
    rejuvenation: float = 0.05
    """Probability that a visited chain of start persistent begins anew before its K steps; it lives
    K/p steps on average."""
    most_visits: int | None = None
    """Visits after which it begins anew in any case; no such end if not given."""
    burn_in: int = 1_000
    """Chains of start burn-in that learning does not see yet."""
    burn_in_visits: int = 750
    """Visits until it sees one."""
    generator: Path | None = None
    """The generator of such starts, as start cooperative writes it: generator.safetensors."""
    generator_lr: float = 2e-4
    """Adam's learning rate of a cooperative generator."""
    langevin_steps: int = 20
    """Langevin steps K between two updates."""
    step_size: float = 0.06
    """Langevin step size, in [-1, 1] units."""
    temperature: float = 0.0036
    """Temperature T."""
    adjusted: bool = False
    """Let a Metropolis test accept or refuse each step of learning's chains (MALA)."""
    purification: int | None = None
    """Steps that the energy shall purify by, to be compared with how long its chains live."""
    data_noise: float = 0.12
    """Standard deviation of the noise on training images, in [-1, 1] units."""
    adam_lr: float = 2e-4
    """Adam's learning rate at the start."""
    final_lr: float = 1e-5
    """Adam's learning rate at the end of its cosine."""
    drops: tuple[int, ...] = ()
    """Updates from which Adam's rate falls to a tenth, in place of the cosine."""
    sgd_from: int | None = None
    """The update from which plain SGD takes over; Adam throughout if not given."""
    sgd_lr: float = 5e-5
    """SGD's learning rate, in units of the temperature."""
    average: float = 0.999
    """Decay of the weights' running average."""
    limit: float = 1e4
    """Difference of energies, in units of T, beyond which learning counts as diverged."""
    setbacks: int = 3
    """How often a divergence leads back to the last checkpoint with half the learning rate."""
    checkpoint_every: int = 250
    """Updates between two checkpoints."""
    pictures_every: int = 2_500
    """Updates between two sets of pictures of long chains."""
    chain_lengths: tuple[int, ...] = (100, 300, 1_000, 3_000, 10_000)
    """Steps at which chains from data are pictured."""
    precision: str = "fastest"
    """Precision of the learning chains' inner activations: fp32, bf16, or fastest (bf16 where it is
    native). The pictures' long chains are fp32."""
    device: Device = "auto"
    """Where to compute."""
    seed: int = 0
    """Seed of every draw."""
    resume: bool = False
    """Go on from the checkpoint in OUT, if there is one yet."""

    recipe_file = staticmethod(recipe_file)

    def settings(self) -> EnergyRecipe:
        """Return the learning settings among these options."""
        chain = LangevinSettings(
            steps=self.langevin_steps,
            step_size=self.step_size,
            temperature=self.temperature,
            adjusted=self.adjusted,
        )
        own = {f.name for f in fields(EnergyRecipe)} - {"langevin"}
        return EnergyRecipe(langevin=chain, **{name: getattr(self, name) for name in own})

    def run(self) -> int:
        """Learn, keep checkpoints, draw pictures."""
        if min(self.checkpoint_every, self.pictures_every) < 1 or not self.chain_lengths:
            raise UsageError(
                "checkpoint_every and pictures_every must be ≥ 1, chain_lengths given."
            )
        recipe, device = self.settings(), resolve_device(self.device)
        out = writable_folder(self.out)
        checkpoint = checkpoint_of(out, self, FIXED)
        opened = self.photos.open(self.data, "train", self.data_root, labelled=False)
        images = opened.take(self.images).images
        trainer = EnergyTrainer(
            self._energy(images).to(device),
            images,
            recipe,
            self.precision,
            generator=self._generator(images, device),
            team=Team.of(device),
        )
        if trainer.team.leads:
            tell_lifetime(trainer.objective.lifetime(), self.purification)
        if checkpoint is None:
            keep(trainer, out, self.data)
        else:
            trainer.load(checkpoint)
        if trainer.team.leads:
            write_settings(out, self)
        self._learn(trainer, out)
        trainer.team.leave()
        return 0

    def _energy(self, images: torch.Tensor) -> nn.Module:
        if images.shape[-1] != images.shape[-2]:
            raise UsageError(f"an energy needs square images, not {tuple(images.shape[-2:])}.")
        if self.network not in NETWORKS:
            raise UsageError(f"network is {self.network!r}; choose one of {', '.join(NETWORKS)}.")
        name, shape = NETWORKS[self.network]
        settings = shape(
            channels=images.shape[1],
            image_size=images.shape[-1],
            width=self.width,
            activation=self.activation,
        )
        energy = _untrained(partial(ENERGIES[name].make, settings), self.seed)
        if self.init is not None:
            begin_at(energy, self.init)
        return channels_last(self._over_prior(energy))

    def _over_prior(self, energy: nn.Module) -> nn.Module:
        if self.prior is None and self.prior_spread is None:
            return energy
        prior = None if self.prior is None else network_of(self.prior, ENERGIES)
        weight = self.temperature / (self.prior_temperature or self.temperature)
        pull = 0.0 if self.prior_spread is None else self.temperature / self.prior_spread**2
        return over(energy, prior, weight=weight, pull=pull)

    def _generator(self, images: torch.Tensor, device: torch.device) -> nn.Module | None:
        if not {self.start, self.fresh} & {"generator", "cooperative"}:
            return None
        if self.generator is not None:
            return network_of(self.generator, GENERATORS).to(device)
        if "generator" in (self.start, self.fresh):
            raise UsageError(
                "start generator needs --generator FILE, which start cooperative learns and writes."
            )
        settings = ConvSettings(latent=64, channels=images.shape[1], image_size=images.shape[-1])
        return _untrained(partial(ConvGenerator, settings), self.seed).to(device)

    def _learn(self, trainer: EnergyTrainer, out: Path) -> None:
        leads = trainer.team.leads
        bar = tqdm(
            trainer.run(),
            total=self.updates,
            initial=trainer.done,
            unit="update",
            disable=not leads,
        )
        for update in bar:
            bar.set_postfix_str(
                f"d_s {update.energy_difference:+.2f}, r_s {update.gradient_strength:.3f}"
            )
            last = update.number == self.updates
            if last or update.number % self.checkpoint_every == 0:
                keep(trainer, out, self.data)
            if leads and (last or update.number % self.pictures_every == 0):
                self._draw(trainer, out)
        if leads:
            print(f"energy and pictures are in {out}")

    def _draw(self, trainer: EnergyTrainer, out: Path) -> None:
        folder = writable_folder(out / "pictures")
        draw_curves(trainer.history, folder / "curves.png")
        name = f"{trainer.done:07d}"
        if trainer.objective.ends is not None:
            ends = trainer.objective.ends[: 4 * PICTURED]
            save_grid(ends.split(PICTURED), folder / f"ends-{name}.png")
        chains = long_chains(
            trainer.averaged.module,
            trainer.images[:PICTURED].to(trainer.device),
            trainer.recipe.langevin,
            self.chain_lengths,
            self.seed,
        )
        save_grid([chains[k] for k in sorted(chains)], folder / f"chains-{name}.png")


def _untrained(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def begin_at(energy: nn.Module, name: str) -> None:
    """Give an energy the weights of a file, or those of a shipped energy or a folder's.

    Raises:
        UsageError: weights that do not fit, or nothing of that name.
    """
    if learned_folder(name) is None and not names_folder(name):
        load_weights(energy, Path(name))
        return
    other = load_energy(name)
    refuse_other(energy, about(other), name)
    energy.load_state_dict(other.state_dict())


def tell_lifetime(lived: float, purification: int | None) -> None:
    """Print how long chains live in learning, and warn where purification is of another length."""
    if not lived:
        return
    length = "for good" if math.isinf(lived) else f"{lived:,.0f} steps on average"
    beside = "" if purification is None else f"; the energy shall purify by {purification:,} steps"
    print(f"chains live {length}{beside}")
    if purification is not None and not lived / APART <= purification <= lived * APART:
        _log.warning(
            "chains of learning live %s, but purification takes %d steps: an energy is known to "
            "hold for as long as its chains live; change K or p, or the purification.",
            *(length, purification),
        )


def keep(trainer: EnergyTrainer, out: Path, data: str) -> None:
    """Write the averaged weights, the history so far and, last, the checkpoint, each atomically."""
    if trainer.team.leads:
        energy = trainer.averaged.module
        save_tensors(out / ENERGY, energy.state_dict(), about(energy, data=data))
        generator = trainer.generator
        if generator is not None:
            save_tensors(out / GENERATOR, generator.state_dict(), about(generator, data=data))
        history = pd.DataFrame(trainer.history, columns=["update", "d_s", "r_s"])
        write_text(out / "history.csv", history.to_csv(index=False))
    trainer.save(out / CHECKPOINT)
