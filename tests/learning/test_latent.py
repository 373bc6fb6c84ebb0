"""Recipes of generators and energies: their optima where those are known, and exact resumption."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from ebm_defense import ConvEnergy, ConvEnergySettings, UsageError
from ebm_defense.generators.networks import (
    ConvEncoder,
    ConvGenerator,
    ConvSettings,
    DenseEncoder,
    DenseGenerator,
    DenseSettings,
    LatentClassifier,
    LatentClassifierSettings,
    LatentEnergy,
    LatentEnergySettings,
    PairEnergy,
    PairEnergySettings,
)
from ebm_defense.langevin import LangevinSettings
from ebm_defense.learning.draws import Batch, Draws
from ebm_defense.learning.energies.trainer import DivergedError
from ebm_defense.learning.latent.model import Model
from ebm_defense.learning.latent.recipes import (
    RECIPES,
    Labelled,
    attributes,
    gebm,
    joint,
    latent_prior,
    nce,
    triangle,
    vae,
)
from ebm_defense.learning.latent.settings import LatentSettings
from ebm_defense.learning.latent.trainer import LatentTrainer
from ebm_defense.purifiers.path import half_square

COUNT = 20_000
SIGMA = 0.5


def draws(count: int = COUNT, update: int = 0) -> Draws:
    return Draws(
        seed=0, update=update, places=tuple(range(count)), batch=count, device=torch.device("cpu")
    )


def linear_world() -> Model:
    """One latent and one pixel, x = 2z + 0.5 with noise σ = 0.5, and the exact posterior as q."""
    shape = DenseSettings(latent=1, image_size=1, layers=0, bounded=False)
    generator, encoder = DenseGenerator(shape), DenseEncoder(shape)
    generator.load_state_dict(
        {"net.0.0.weight": torch.tensor([[2.0]]), "net.0.0.bias": torch.tensor([0.5])}
    )
    precision = 1 + 4 / SIGMA**2
    slope = 2 / SIGMA**2 / precision
    encoder.load_state_dict(
        {
            "net.1.0.weight": torch.tensor([[slope], [0.0]]),
            "net.1.0.bias": torch.tensor([-0.5 * slope, -math.log(precision) / 2]),
        }
    )
    return Model(generator, encoder, LatentEnergy(LatentEnergySettings(size=1, hidden=4)))


def settings(**more) -> LatentSettings:
    none = LangevinSettings(steps=0, step_size=0.1, temperature=1.0)
    chains = {"prior": none, "posterior": none, "image": replace(none, temperature=0.7)}
    return LatentSettings(sigma=SIGMA, **(chains | more))


def test_the_evidence_bound_is_tight_where_the_encoder_is_the_posterior():
    """Then it is −log p(x) of N(0.5, 4 + σ²) for every x, its KL and its misfit together."""
    x = 1.0 + 0.8 * draws().normal("images", torch.empty(COUNT, 1, 1, 1))
    found = vae(linear_world(), Batch(images=x, draws=draws()), settings())
    variance = 4 + SIGMA**2
    # Left out of the misfit is the constant log σ of N(x; G(z), σ²), and log √2π of both.
    exact = float(half_square(x - 0.5).mean()) / variance + math.log(variance) / 2
    assert float(found["generator"].detach()) == pytest.approx(exact - math.log(SIGMA), abs=0.02)
    assert found["encoder"] is found["generator"]


class Quadratic(nn.Module):
    """a + b·v + c·v² of one number: the log-ratio of any two normal laws."""

    def __init__(self, a: float, b: float, c: float) -> None:
        super().__init__()
        self.factors = nn.Parameter(torch.tensor([a, b, c]))

    def forward(self, v):
        v = v.flatten(1)
        return torch.cat([torch.ones_like(v), v, v**2], dim=1) @ self.factors


def log_ratio(mean: float, variance: float, other_mean: float, other_variance: float):
    """−log N(v; mean, variance)/N(v; other_mean, other_variance) as a + b·v + c·v²."""

    def coefficients(m, s):
        return torch.tensor([m**2 / 2 / s + math.log(s) / 2, -m / s, 1 / 2 / s])

    return (coefficients(mean, variance) - coefficients(other_mean, other_variance)).tolist()


def slopes(loss, energy) -> torch.Tensor:
    return torch.autograd.grad(loss, energy.factors)[0]


def test_gebm_s_likelihood_is_stationary_at_the_log_ratio_of_data_and_base():
    """The base is G(z) = 2z + 0.5, so N(0.5, 4); the data are N(1, 2)."""
    world, s = linear_world(), settings(magnitude=0.0)
    x = 1.0 + math.sqrt(2) * draws().normal("images", torch.empty(COUNT, 1, 1, 1))
    batch = Batch(images=x, draws=draws())
    t = s.image.temperature
    best = Quadratic(*(t * v for v in log_ratio(1, 2, 0.5, 4)))
    model = Model(world.generator, world.encoder, best)
    assert slopes(gebm(model, batch, s)["energy"], best).abs().max() < 0.15
    flat = Quadratic(0.0, 0.0, 0.0)
    model = Model(world.generator, world.encoder, flat)
    assert slopes(gebm(model, batch, s)["energy"], flat)[1:].abs().min() > 0.5


def test_a_stage_of_nce_learns_the_ratio_of_inferred_latents_to_those_it_is_shown():
    """With the exact posterior as q, data N(0.5 + 2·1, σ² + 4v) have aggregated latents of a known
    normal law; the first stage sees N(0, 1) beside them.
    """
    world, s = linear_world(), settings(updates=300)
    precision = 1 + 4 / SIGMA**2
    gain = 4 / SIGMA**2 / precision  # of z in the posterior's mean
    x = 0.5 + 2.0 + 1.0 * draws(400).normal("images", torch.empty(400, 1, 1, 1))
    mean, variance = gain * 1.0, gain**2 * float(x.var()) / 4 + 1 / precision
    mean = gain * (float(x.mean()) - 0.5) / 2
    a, b, c = log_ratio(mean, variance, 0, 1)
    energy = LatentEnergy(LatentEnergySettings(size=1, hidden=32, stages=1))
    model = Model(world.generator, world.encoder, energy)
    optimiser = torch.optim.Adam(energy.parameters(), lr=1e-2)
    for update in range(300):
        optimiser.zero_grad()
        batch = Batch(images=x, draws=draws(400, update))
        nce(model, batch, s)["energy"].backward()
        optimiser.step()
    z = torch.linspace(mean - 0.7, mean + 0.7, 9)[:, None]
    exact = a + b * z[:, 0] + c * z[:, 0] ** 2
    assert float((energy(z).detach() - exact).abs().max()) < 0.35
    assert float(exact.max() - exact.min()) > 1.0


def test_a_latent_prior_comes_to_dream_the_latents_that_it_infers():
    """Data are N(2.5, 1): their latents, of known mean and variance, are not N(0, 1)."""
    chain = LangevinSettings(steps=30, step_size=0.3, temperature=1.0)
    world, s = linear_world(), settings(prior=chain, posterior=chain)
    energy = LatentEnergy(LatentEnergySettings(size=1, hidden=32))
    model = Model(world.generator, world.encoder, energy)
    x = 2.5 + draws(200).normal("images", torch.empty(200, 1, 1, 1))
    optimiser = torch.optim.Adam(energy.parameters(), lr=2e-2)
    for update in range(80):
        optimiser.zero_grad()
        found = latent_prior(model, Batch(images=x, draws=draws(200, update)), s)
        found["energy"].backward()
        optimiser.step()
    dreamt = model.prior(draws(2000, 99), chain)
    precision = 1 + 4 / SIGMA**2
    assert float(dreamt.mean()) == pytest.approx(2 / SIGMA**2 / precision * 2, abs=0.15)
    assert float(dreamt.var()) == pytest.approx(1 / 4, rel=0.35)


def test_nce_takes_its_stages_one_after_another():
    world = linear_world()
    energy = LatentEnergy(LatentEnergySettings(size=1, hidden=4, stages=3))
    model, x = Model(world.generator, world.encoder, energy), torch.zeros(8, 1, 1, 1)
    for update, learns in ((0, 0), (1, 0), (2, 1), (5, 2)):
        batch = Batch(images=x, draws=draws(8, update))
        energy.zero_grad()
        nce(model, batch, settings(updates=6))["energy"].backward()
        moved = [any(p.grad is not None for p in stage.parameters()) for stage in energy.stages]
        assert moved == [stage == learns for stage in range(3)]


def test_the_triangle_adds_the_critic_and_the_inferred_latents_to_the_evidence_bound():
    world, s = linear_world(), settings(magnitude=0.0)
    model = Model(world.generator, world.encoder, Quadratic(0.3, -0.4, 0.2))
    x, drawn = torch.linspace(-1, 1, 64).view(64, 1, 1, 1), draws(64)
    found = triangle(model, Batch(images=x, draws=drawn), s)
    z = drawn.normal("latents", torch.empty(64, 1))
    image, bound = 2 * z + 0.5, vae(model, Batch(images=x, draws=drawn), s)["generator"]
    surprise = model.surprise(z, image.view(64, 1, 1, 1))
    critic = model.energy(image).mean() / s.image.temperature
    torch.testing.assert_close(found["generator"], bound + critic + surprise)
    torch.testing.assert_close(found["encoder"], bound + surprise)
    true = model.energy(x).mean() / s.image.temperature
    torch.testing.assert_close(found["energy"], true - critic)


class Product(nn.Module):
    """w·x·z of one pixel and one latent."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(0.7))

    def forward(self, x, z):
        return self.w * x.flatten(1)[:, 0] * z[:, 0]


def test_the_triangle_of_joint_densities_is_that_of_its_three_divergences():
    """By −log p(x, z), −log q(z | x) and E(x, z), each from what it is of, up to constants."""
    world, s, t = linear_world(), settings(magnitude=0.0), 0.7
    model = Model(world.generator, world.encoder, Product())
    x, drawn = torch.linspace(-1, 1, 64).view(64, 1, 1, 1), draws(64)
    found = joint(model, Batch(images=x, draws=drawn), s)
    z, _ = model.infer(x, drawn.normal("inferred", torch.empty(64, 1)))
    dreamt = drawn.normal("latents", torch.empty(64, 1))
    of_data = (0.7 * x[:, 0, 0, 0] * z[:, 0]).mean() / t
    of_dreams = (0.7 * (2 * dreamt[:, 0] + 0.5) * dreamt[:, 0]).mean() / t
    evidence = ((x.flatten(1) - 2 * z - 0.5) ** 2 / SIGMA**2 + z**2).mean() / 2  # −log p(x, z)
    torch.testing.assert_close(found["energy"], of_data - of_dreams)
    torch.testing.assert_close(found["encoder"], evidence - of_data)
    bound = vae(model, Batch(images=x, draws=drawn), s)["generator"]
    torch.testing.assert_close(found["generator"], bound + of_dreams)


def networks(recipe: str, upper: int = 0) -> Model:
    torch.manual_seed(0)
    shape = ConvSettings(latent=3, upper=upper, image_size=8, width=2)
    energy: nn.Module = LatentEnergy(LatentEnergySettings(size=shape.size, hidden=4, stages=2))
    if RECIPES[recipe].energy == "images":
        energy = ConvEnergy(
            ConvEnergySettings(channels=1, image_size=8, width=2, activation="silu")
        )
    if RECIPES[recipe].energy == "attributes":
        energy = LatentClassifier(LatentClassifierSettings(size=3, values=(3, 2), hidden=4))
    if RECIPES[recipe].energy == "pairs":
        energy = PairEnergy(PairEnergySettings(latent=3, image_size=8, width=2, hidden=4))
    return Model(ConvGenerator(shape), ConvEncoder(shape), energy)


def trainer(recipe: str, upper: int = 0, **more) -> LatentTrainer:
    short = LangevinSettings(steps=2, step_size=0.1, temperature=1.0)
    s = LatentSettings(updates=4, batch=5, prior=short, posterior=short, image=short, **more)
    images = torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    values = torch.stack([torch.arange(20) % 3, torch.arange(20) % 2], dim=1)
    labelled = values if recipe == "attributes" else None
    return LatentTrainer(networks(recipe, upper), images, recipe, s, labelled)


@pytest.mark.parametrize(("recipe", "upper"), [*((r, 0) for r in RECIPES), ("latent-prior", 2)])
def test_every_recipe_moves_what_it_learns_alone_and_goes_on_exactly(recipe, upper, tmp_path):
    whole, parts = trainer(recipe, upper), trainer(recipe, upper)
    before = {k: [p.clone() for p in n.parameters()] for k, n in whole.model.networks.items()}
    losses = [update.losses for update in whole.run()]
    run = parts.run()
    seen = [next(run).losses for _ in range(2)]
    parts.save(tmp_path / "checkpoint.pt")
    resumed = trainer(recipe, upper)
    resumed.load(tmp_path / "checkpoint.pt")
    assert seen + [u.losses for u in resumed.run()] == losses
    for name, network in whole.model.networks.items():
        pairs = list(zip(network.parameters(), before[name], strict=True))
        moved = any(not torch.equal(p, q) for p, q in pairs)
        assert moved == (name in losses[0])
        same = zip(network.parameters(), resumed.model.networks[name].parameters(), strict=True)
        assert all(torch.equal(p, q) for p, q in same)
    assert whole.purifier().image_shape == (1, 8, 8)
    samples = whole.samples(6)
    assert samples.shape == (6, 1, 8, 8)
    torch.testing.assert_close(samples, resumed.samples(6))


def test_a_checkpoint_of_another_recipe_or_seed_is_refused(tmp_path):
    begun = trainer("vae")
    begun.save(tmp_path / "checkpoint.pt")
    with pytest.raises(UsageError, match="begun with recipe vae"):
        trainer("latent-prior").load(tmp_path / "checkpoint.pt")
    with pytest.raises(UsageError, match="begun with seed 0"):
        trainer("vae", seed=1).load(tmp_path / "checkpoint.pt")


def test_a_loss_that_runs_away_ends_the_run_and_leaves_the_weights():
    learns = trainer("triangle")
    weights = learns.model.energy.state_dict()
    weights["f.0.bias"].fill_(float("nan"))
    before = [p.clone() for p in learns.model.generator.parameters()]
    with pytest.raises(DivergedError, match="diverged at update 1"):
        next(learns.run())
    after = learns.model.generator.parameters()
    assert all(torch.equal(p, q) for p, q in zip(after, before, strict=True))


def test_attributes_are_learned_each_by_its_own_values():
    world = linear_world()
    classifier = LatentClassifier(LatentClassifierSettings(size=1, values=(2, 3), hidden=8))
    model = Model(world.generator, world.encoder, classifier)
    x = torch.tensor([-3.0, 0.5, 4.0]).repeat(50).view(150, 1, 1, 1)  # z about −1.7, 0 and 1.7
    values = torch.tensor([[0, 2], [1, 0], [1, 1]]).repeat(50, 1)
    optimiser = torch.optim.Adam(classifier.parameters(), lr=3e-2)
    for update in range(80):
        optimiser.zero_grad()
        batch = Labelled(images=x, draws=draws(150, update), values=values)
        attributes(model, batch, settings())["energy"].backward()
        optimiser.step()
    seen = classifier(torch.tensor([[-1.7], [0.0], [1.7]]))
    first, second = seen.split([2, 3], dim=1)
    assert first.argmax(1).tolist() == [0, 1, 1]
    assert second.argmax(1).tolist() == [2, 0, 1]
    torch.testing.assert_close(first.exp().sum(1), torch.ones(3))


def test_unknown_recipes_and_numbers_out_of_range_are_refused():
    with pytest.raises(UsageError, match="recipe is 'gan'"):
        LatentTrainer(networks("vae"), torch.rand(2, 1, 8, 8), "gan", LatentSettings())
    for wrong in ({"sigma": 0.0}, {"updates": 0}, {"average": 1.0}):
        with pytest.raises(UsageError, match="must be"):
            LatentSettings(**wrong)
