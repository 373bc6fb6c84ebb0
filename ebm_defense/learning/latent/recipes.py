"""Ways to learn a generator and an energy: each says what every network descends.

z⁺ explains a training image x, z⁻ is dreamt by the model; U is an energy of latents, E of images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from ebm_defense.generators.networks import LatentClassifier, LatentEnergy
from ebm_defense.langevin import run_chain
from ebm_defense.learning.draws import Batch, Draws
from ebm_defense.learning.latent.model import Model
from ebm_defense.learning.latent.settings import LatentSettings
from ebm_defense.purifiers.attributes import AttributePurifier
from ebm_defense.purifiers.gebm import GEBMPurifier
from ebm_defense.purifiers.hat import HatPurifier
from ebm_defense.purifiers.latent import LatentPurifier
from ebm_defense.purifiers.pair import PairPurifier
from ebm_defense.purifiers.path import LatentPath, half_square

SMALL = 1.25e-3
"""T = ε²/2 of the usual step size ε of 0.05: the chain's update is x − ∇E + ε·noise."""

Losses = dict[str, Tensor]
"""What each network that learns descends, by the network's name."""


@dataclass(frozen=True, kw_only=True)
class Labelled(Batch):
    """A batch whose images have attributes.

    Attributes:
        values: of each, int64 `[b, attributes]`.
    """

    values: Tensor


def vae(m: Model, batch: Batch, s: LatentSettings) -> Losses:
    """Descend the negative evidence bound (Kingma, Welling 2014); the prior is N(0, I)."""
    z, divergence = m.infer(batch.images, draw(m, batch, "inferred"))
    bound = m.misfit(batch.images, z, s.sigma) + divergence
    return {"generator": bound, "encoder": bound}


def latent_prior(m: Model, batch: Batch, s: LatentSettings) -> Losses:
    """Maximise likelihood with short-run chains (Pang et al. 2020, algorithm 1); of two layers,
    that of the joint prior (Cui, Wu, Han 2023).

    The encoder, which the papers do not have, learns where the posterior's chains end, so that
    purification has a start.
    """
    x, draws = batch.images, batch.draws
    inferred = m.posterior(x, m.latents(draws, "inferred"), draws, s.posterior, s.sigma)
    dreamt = m.prior(draws, s.prior)
    difference = m.prior_energy(inferred).mean() - m.prior_energy(dreamt).mean()
    return {
        "energy": difference,
        # Of two layers, the upper one's way to the lower is the generator's too.
        "generator": m.misfit(x, inferred, s.sigma) + difference,
        "encoder": m.surprise(inferred, x),
    }


def nce(m: Model, batch: Batch, s: LatentSettings) -> Losses:
    """Learn a prior in stages, each telling inferred latents from those that the stages before it
    dream (Xiao, Han 2022); generator and encoder are given.

    Stages take turns of equally many updates; stage n's energy is −log of the ratio that it finds.
    """
    energy = m.energy
    assert isinstance(energy, LatentEnergy)
    stage = batch.draws.update * len(energy.stages) // s.updates
    inferred = m.infer(batch.images, draw(m, batch, "inferred"))[0].detach()
    dreamt = m.prior(batch.draws, s.prior, stage)
    true, false = (energy.stages[stage](m.generator.latents(z)) for z in (inferred, dreamt))
    return {"energy": F.softplus(true).mean() + F.softplus(-false).mean()}


def triangle(m: Model, batch: Batch, s: LatentSettings) -> Losses:
    """Close the divergence triangle between data with inferred latents Q, the generator's joint
    density P, and the energy's Π: KL(Q ‖ P) + KL(P ‖ Π) − KL(Q ‖ Π) (Han et al. 2019).

    Generated images are G(z) without the noise σ. A penalty on the energy's size is ours.
    """
    x, t = batch.images, s.image.temperature
    z, divergence = m.infer(x, draw(m, batch, "inferred"))
    dreamt = m.latents(batch.draws, "latents")
    image = m.generator(dreamt)
    bound = m.misfit(x, z, s.sigma) + divergence
    return {
        "energy": contrast(m.energy(x) / t, m.energy(image.detach()) / t, s),
        "generator": bound + m.energy(image).mean() / t + m.surprise(dreamt, image),
        "encoder": bound + m.surprise(dreamt, image.detach()),
    }


def dual_mcmc(m: Model, batch: Batch, s: LatentSettings) -> Losses:
    """Let chains of both models teach what starts them (Cui, Han 2023, dual-MCMC teaching).

    The energy's chains begin at generated images, the posterior's at inferred latents. Generator
    and encoder learn from where both end; the energy learns by maximum likelihood.
    """
    x, draws = batch.images, batch.draws
    first = m.infer(x, draw(m, batch, "inferred"))[0]
    inferred = m.posterior(x, first, draws, s.posterior, s.sigma)
    dreamt = m.latents(draws, "latents")
    revised = run_chain(
        m.generator(dreamt).detach(), draws.noise("image chain"), energy=m.energy, settings=s.image
    )
    return {
        "energy": (m.energy(x).mean() - m.energy(revised).mean()) / s.image.temperature,
        "generator": m.misfit(x, inferred, s.sigma) + m.misfit(revised, dreamt, s.sigma),
        "encoder": m.surprise(inferred, x) + m.surprise(dreamt, revised),
    }


def hat(m: Model, batch: Batch, s: LatentSettings) -> Losses:
    """Maximise the likelihood of E(G(z) + y) by its joint chains (Hill et al. 2022); generator and
    encoder are given.
    """
    dreamt = m.hat(batch.draws, s.image, s.latent_step_size)
    x = batch.noisy(s.image.step_size)
    return {"energy": (m.energy(x).mean() - m.energy(dreamt).mean()) / s.image.temperature}


def gebm(m: Model, batch: Batch, s: LatentSettings) -> Losses:
    """Maximise the generalised likelihood of an energy on the generator's base, E[E(x)] +
    E[exp(−E(G(z)))] − 1 with the constant in E (Arbel, Zhou, Gretton 2021, KALE); generator and
    encoder are given.

    A penalty on the energy's size is ours, in place of the paper's on its gradient.
    """
    x, t = batch.images, s.image.temperature
    base = m.generator(m.latents(batch.draws, "latents")).detach()
    true, false = m.energy(x) / t, m.energy(base) / t
    bound = true.mean() + (-false).exp().mean() - 1.0
    return {"energy": bound + s.magnitude * (true.square() + false.square()).mean()}


def joint(m: Model, batch: Batch, s: LatentSettings) -> Losses:
    """Close the triangle of three joint densities of image and latents: KL(Q ‖ P) + KL(P ‖ Π) −
    KL(Q ‖ Π), with an energy E(x, z) of both (Han et al. 2020).

    The entropy of q(z | x) is in two of the three and cancels. A penalty on the energy's size is
    ours.
    """
    x, t = batch.images, s.image.temperature
    z, divergence = m.infer(x, draw(m, batch, "inferred"))
    dreamt = m.latents(batch.draws, "latents")
    image = m.generator(dreamt)
    misfit = m.misfit(x, z, s.sigma)
    true, false = m.energy(x, z.detach()) / t, m.energy(image.detach(), dreamt) / t
    return {
        "energy": contrast(true, false, s),
        "generator": misfit + divergence + m.energy(image, dreamt).mean() / t,
        "encoder": misfit + half_square(z).mean() - m.energy(x, z).mean() / t,
    }


def attributes(m: Model, batch: Batch, s: LatentSettings) -> Losses:
    """Learn log p(c | z) of each attribute from inferred latents, by cross-entropy (Nie, Vahdat,
    Anandkumar 2021); generator and encoder are given.
    """
    assert isinstance(batch, Labelled)
    assert isinstance(m.energy, LatentClassifier)
    z = m.infer(batch.images, draw(m, batch, "inferred"))[0].detach()
    parts = m.energy(z).split(list(m.energy.settings.values), dim=1)
    pairs = zip(parts, batch.values.unbind(1), strict=True)
    return {"energy": torch.stack([F.nll_loss(seen, true) for seen, true in pairs]).sum()}


def contrast(true: Tensor, false: Tensor, s: LatentSettings) -> Tensor:
    """Return the mean energy of data less that of dreams, in units of T, and the penalty."""
    return true.mean() - false.mean() + s.magnitude * (true.square() + false.square()).mean()


def draw(m: Model, batch: Batch, purpose: str) -> Tensor:
    """Draw standard normal noise for latents."""
    return m.latents(batch.draws, purpose)


def posterior_purifier(m: Model, s: LatentSettings) -> LatentPath:
    """Purify by posterior chains from the encoder's latents."""
    chain = s.posterior
    return LatentPurifier(m.energy, m.generator, m.encoder, chain.steps, chain.step_size, s.sigma)


def hat_purifier(m: Model, s: LatentSettings) -> LatentPath:
    """Purify by the chains that the energy was learned with."""
    c = s.image
    return HatPurifier(
        m.energy, m.generator, m.encoder, c.steps, c.step_size, s.latent_step_size, c.temperature
    )


def gebm_purifier(m: Model, s: LatentSettings) -> LatentPath:
    """Purify by latent chains of the base and the energy, from the encoder's latents."""
    chain = s.posterior
    return GEBMPurifier(
        m.energy, m.generator, m.encoder, chain.steps, chain.step_size, s.image.temperature
    )


def pair_purifier(m: Model, s: LatentSettings) -> LatentPath:
    """Purify by chains of image and latents."""
    c = s.image
    return PairPurifier(
        m.energy, m.encoder, c.steps, c.step_size, s.latent_step_size, c.temperature
    )


def attribute_purifier(m: Model, s: LatentSettings) -> AttributePurifier:
    """Purify by the flow along composed attributes."""
    classifier = cast(LatentClassifier, m.energy)
    return AttributePurifier(classifier, m.generator, m.encoder, s.posterior.steps, s.flow_time)


def prior_samples(m: Model, draws: Draws, s: LatentSettings) -> Tensor:
    """Draw images of the prior's latents."""
    return m.generator(m.prior(draws, s.prior))


def hat_samples(m: Model, draws: Draws, s: LatentSettings) -> Tensor:
    """Draw images by the joint chains."""
    return m.hat(draws, s.image, s.latent_step_size)


def based_samples(m: Model, draws: Draws, s: LatentSettings) -> Tensor:
    """Draw images by latent chains of the base and the energy."""
    return m.generator(m.based(draws, s.prior, s.image.temperature))


def pair_samples(m: Model, draws: Draws, s: LatentSettings) -> Tensor:
    """Draw images by the chains of image and latents."""
    return m.pairs(draws, s.image, s.latent_step_size)["x"]


def attribute_samples(m: Model, draws: Draws, s: LatentSettings) -> Tensor:
    """Draw images of the first attribute's values in turn, whatever the others are."""
    flow = attribute_purifier(m, s)
    values = flow.latent_classifier.settings.values
    z = m.latents(draws, "latents")
    belief = torch.cat([z.new_full((len(z), v), 1 / v) for v in values], dim=1)
    belief[:, : values[0]] = F.one_hot(torch.arange(len(z)) % values[0], values[0]).to(belief)
    ends = flow.advance({"z": z, "belief": belief}, draws.noise("flow"), range(flow.steps))
    return m.generator(ends["z"])


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One way to learn, and what comes of it.

    Attributes:
        losses: what each network descends, from the model, a batch and all settings.
        purifier: what purifies with what was learned.
        samples: `[b, C, H, W]` in [-1, 1] that the model dreams.
        energy: what it is of, "latents", "images", "pairs" of both, or
            "attributes".
        given: whether generator and encoder are given, and the energy alone learns.
        temperature: of an image energy, T > 0, unless it is set.
        energy_lr: Adam's learning rate of the energy, unless it is set.
    """

    losses: Callable[[Model, Batch, LatentSettings], Losses]
    purifier: Callable[[Model, LatentSettings], LatentPath]
    samples: Callable[[Model, Draws, LatentSettings], Tensor]
    energy: str
    given: bool = False
    temperature: float = 1.0
    energy_lr: float = 2e-4


def _of_latents(losses: Callable[..., Losses], given: bool = False) -> Recipe:
    return Recipe(
        losses=losses,
        purifier=posterior_purifier,
        samples=prior_samples,
        energy="latents",
        given=given,
        energy_lr=1e-3,
    )


def _of_images(
    losses: Callable[..., Losses], given: bool = False, temperature: float = 1.0
) -> Recipe:
    return Recipe(
        losses=losses,
        purifier=gebm_purifier,
        samples=based_samples,
        energy="images",
        given=given,
        temperature=temperature,
    )


RECIPES: dict[str, Recipe] = {
    "vae": _of_latents(vae),
    "latent-prior": _of_latents(latent_prior),
    "nce": _of_latents(nce, given=True),
    "triangle": _of_images(triangle),
    "dual-mcmc": _of_images(dual_mcmc, temperature=SMALL),
    "joint": Recipe(losses=joint, purifier=pair_purifier, samples=pair_samples, energy="pairs"),
    "gebm": _of_images(gebm, given=True),
    "attributes": Recipe(
        losses=attributes,
        purifier=attribute_purifier,
        samples=attribute_samples,
        energy="attributes",
        given=True,
        energy_lr=3e-3,
    ),
    "hat": replace(
        _of_images(hat, given=True, temperature=SMALL),
        purifier=hat_purifier,
        samples=hat_samples,
    ),
}
"""By the names that `train-latent --recipe` knows."""
