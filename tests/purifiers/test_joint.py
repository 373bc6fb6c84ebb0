"""Chains over latents are what their papers say: against closed forms and plain autograd."""

from __future__ import annotations

import pytest
import torch

from ebm_defense import ConvEnergy, ConvEnergySettings, QuadraticEnergy, UsageError
from ebm_defense.attacks import Full
from ebm_defense.generators.networks import (
    ConvEncoder,
    ConvGenerator,
    ConvSettings,
    DenseEncoder,
    DenseGenerator,
    DenseSettings,
    LatentEnergy,
    LatentEnergySettings,
)
from ebm_defense.noise import KeyedNoise, chain_keys
from ebm_defense.purifiers.gebm import GEBMPurifier
from ebm_defense.purifiers.hat import HatPurifier
from ebm_defense.purifiers.latent import LatentPurifier
from ebm_defense.purifiers.pair import PairPurifier

# The linear world: G(z) = Wz + b and Enc(x) = Rx + c of 3 latents and 2 × 2 pixels, all energies
# quadratic. Every chain is then affine in its state, with moments and Jacobian in closed form.
LATENT, SIDE = 3, 2
PIXELS = SIDE**2
SIZE, TEMPERATURE, SIGMA, RESIDUAL = 0.4, 0.7, 0.6, 0.3


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def positive(d: int, seed: int) -> torch.Tensor:
    """A positive definite matrix with eigenvalues from 0.5 to 1.5."""
    q, _ = torch.linalg.qr(normal(d, d, seed=seed))
    return q @ torch.diag(torch.linspace(0.5, 1.5, d).double()) @ q.T


A, LAMBDA = positive(PIXELS, 1), positive(LATENT, 2)
W, B = 0.7 * normal(PIXELS, LATENT, seed=3), 0.3 * normal(PIXELS, seed=4)
R, C = 0.5 * normal(LATENT, PIXELS, seed=5), 0.3 * normal(LATENT, seed=6)
MU, NU = normal(PIXELS, seed=7), normal(LATENT, seed=8)
SHAPE = {"latent": LATENT, "image_size": SIDE, "layers": 0}


def linear_generator() -> DenseGenerator:
    generator = DenseGenerator(DenseSettings(bounded=False, **SHAPE)).double()
    generator.load_state_dict({"net.0.0.weight": W, "net.0.0.bias": B})
    return generator.requires_grad_(False)


def linear_encoder() -> DenseEncoder:
    encoder = DenseEncoder(DenseSettings(**SHAPE)).double()
    spread = torch.zeros_like(R), torch.zeros_like(C)
    encoder.load_state_dict({"net.1.0.weight": torch.cat([R, spread[0]]),
                             "net.1.0.bias": torch.cat([C, spread[1]])})  # fmt: skip
    return encoder.requires_grad_(False)


class World:
    """A purifier in the linear world, and what is known of it: V = ½·vᵀHv − hᵀv + const over the
    joint state v, whose first numbers are `entered` from an image x in [-1, 1] by v = Px + p.
    """

    def __init__(self, purifier, hessian, pull, enter, offset, leave, moves):
        self.purifier, self.hessian, self.pull = purifier, hessian, pull
        self.enter, self.offset, self.leave = enter, offset, leave
        self.moves = moves  # pairs of a slice of v and its step size, in their order

    def step(self, mean, covariance):
        """Return the moments after one step."""
        for rows, size in self.moves:
            drift = torch.zeros(len(self.hessian), dtype=torch.float64)
            drift[rows] = size**2 / 2
            mean = mean - drift * (self.hessian @ mean - self.pull)
            m = torch.eye(len(drift)).double() - drift[:, None] * self.hessian
            covariance = m @ covariance @ m.T
            covariance[rows, rows] += size**2 * torch.eye(rows.stop - rows.start).double()
        return mean, covariance

    def jacobian(self):
        """Return the derivative of the purified image by the image, [0, 1] units cancelling."""
        total = torch.eye(len(self.hessian)).double()
        for _ in range(self.purifier.steps):
            for rows, size in self.moves:
                m = torch.eye(len(total)).double()
                m[rows] -= size**2 / 2 * self.hessian[rows]
                total = m @ total
        return self.leave @ total @ self.enter


def hat(steps: int, latent_step_size: float = SIZE) -> World:
    energy = QuadraticEnergy(MU.view(1, SIDE, SIDE), A)
    purifier = HatPurifier(
        energy, linear_generator(), linear_encoder(), steps, 0.5, latent_step_size,
        TEMPERATURE, RESIDUAL,
    )  # fmt: skip
    sum_of = torch.cat([W, torch.eye(PIXELS).double()], dim=1)  # G(z) + y = sum_of·v + b
    hessian = sum_of.T @ A @ sum_of / TEMPERATURE
    hessian[LATENT:, LATENT:] += 2 * RESIDUAL * torch.eye(PIXELS).double()
    pull = sum_of.T @ A @ (MU - B) / TEMPERATURE
    enter = torch.cat([R, torch.eye(PIXELS).double() - W @ R])
    offset = torch.cat([C, -B - W @ C])
    z, y = slice(0, LATENT), slice(LATENT, LATENT + PIXELS)
    moves = [(z, latent_step_size), (y, 0.5)]
    return World(purifier, hessian, pull, enter, offset, sum_of, moves)


def hat_held(steps: int) -> World:
    return hat(steps, 0.0)


def gebm(steps: int) -> World:
    energy = QuadraticEnergy(MU.view(1, SIDE, SIDE), A)
    purifier = GEBMPurifier(energy, linear_generator(), linear_encoder(), steps, SIZE, TEMPERATURE)
    hessian = torch.eye(LATENT).double() + W.T @ A @ W / TEMPERATURE
    pull = W.T @ A @ (MU - B) / TEMPERATURE
    return World(purifier, hessian, pull, R, C, W, [(slice(0, LATENT), SIZE)])


def latent(steps: int) -> World:
    """Its state is (z, x), of which x is held."""
    purifier = LatentPurifier(
        QuadraticEnergy(NU, LAMBDA), linear_generator(), linear_encoder(), steps, SIZE, SIGMA
    )
    hessian = torch.zeros(LATENT + PIXELS, LATENT + PIXELS).double()
    hessian[:LATENT, :LATENT] = LAMBDA + torch.eye(LATENT).double() + W.T @ W / SIGMA**2
    hessian[:LATENT, LATENT:] = -W.T / SIGMA**2
    pull = torch.cat([LAMBDA @ NU - W.T @ B / SIGMA**2, torch.zeros(PIXELS).double()])
    enter, offset = torch.cat([R, torch.eye(PIXELS).double()]), torch.cat([C, torch.zeros(PIXELS)])
    leave = torch.cat([W, torch.zeros(PIXELS, PIXELS).double()], dim=1)
    return World(purifier, hessian, pull, enter, offset, leave, [(slice(0, LATENT), SIZE)])


class Both(torch.nn.Module):
    """½·vᵀAv of v = (z, x), with A of unlike parts."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("a", positive(LATENT + PIXELS, 11))

    def forward(self, x, z):
        v = torch.cat([z, x.flatten(1)], dim=1)
        return (v @ self.a.to(v) * v).sum(1) / 2


def pair(steps: int) -> World:
    purifier = PairPurifier(Both(), linear_encoder(), steps, 0.5, SIZE, TEMPERATURE)
    enter, offset = torch.cat([R, torch.eye(PIXELS).double()]), torch.cat([C, torch.zeros(PIXELS)])
    leave = torch.cat([torch.zeros(PIXELS, LATENT), torch.eye(PIXELS)], dim=1).double()
    z, x = slice(0, LATENT), slice(LATENT, LATENT + PIXELS)
    pull, hessian = torch.zeros(LATENT + PIXELS).double(), Both().a / TEMPERATURE
    return World(purifier, hessian, pull, enter, offset, leave, [(z, SIZE), (x, 0.5)])


WORLDS = {"hat": hat, "hat, z held": hat_held, "gebm": gebm, "latent": latent, "pair": pair}
NAMES = {"hat": "zy", "hat, z held": "zy", "gebm": "z", "latent": "zx", "pair": "zx"}


def keyed(chains: int) -> KeyedNoise:
    return KeyedNoise(chain_keys(0, "joint", range(chains), range(1))[0])


def flat(state, name: str) -> torch.Tensor:
    return torch.cat([state[k].flatten(1) for k in NAMES[name]], dim=1)


# Of n exactly normal chains the sample mean has standard error √(S_ii/n) and the sample covariance
# √((S_ii·S_jj + S_ij²)/(n − 1)); 4.5 of them are exceeded with probability 7e-6, and some 150
# statistics are compared.
CHAINS, SIGMAS = 10_000, 4.5


def assert_moments(found, mean, covariance) -> None:
    n, variance = len(found), covariance.diag()
    moves = variance > 1e-12
    torch.testing.assert_close(found[:, ~moves], mean[~moves].expand(n, -1), rtol=0, atol=1e-9)
    found, mean, variance = found[:, moves], mean[moves], variance[moves]
    covariance = covariance[moves][:, moves]
    error = ((torch.outer(variance, variance) + covariance**2) / (n - 1)).sqrt()
    assert float(((found.mean(0) - mean) / (variance / n).sqrt()).abs().max()) < SIGMAS
    assert float(((found.T.cov() - covariance) / error).abs().max()) < SIGMAS


@pytest.mark.parametrize("name", WORLDS)
@pytest.mark.parametrize("steps", [1, 60])
def test_ten_thousand_chains_have_the_moments_of_the_closed_form(name, steps):
    world = WORLDS[name](steps)
    image = normal(1, 1, SIDE, SIDE, seed=9).sigmoid()
    mean = world.enter @ (2 * image.flatten() - 1) + world.offset
    covariance = torch.zeros_like(world.hessian)
    for _ in range(steps):
        mean, covariance = world.step(mean, covariance)
    images, noise = image.expand(CHAINS, -1, -1, -1), keyed(CHAINS)
    ends = world.purifier.advance(world.purifier.enter(images), noise, range(steps))
    assert_moments(flat(ends, name), mean, covariance)
    purified = world.purifier.purify(images, noise).flatten(1)
    centre = (world.leave @ mean + (0 if name == "pair" else B) + 1) / 2
    assert_moments(purified, centre, world.leave @ covariance @ world.leave.T / 4)


def stationary(world: World):
    """Return the moments that a step leaves as they are: of the affine map v → Mv + m it makes."""
    d = len(world.hessian)
    nothing = torch.zeros(d, d).double()
    offset, added = world.step(torch.zeros(d).double(), nothing)
    m = torch.stack([world.step(e, nothing)[0] - offset for e in torch.eye(d).double()], dim=1)
    covariance = torch.linalg.solve(torch.eye(d * d).double() - torch.kron(m, m), added.flatten())
    return torch.linalg.solve(torch.eye(d).double() - m, offset), covariance.view(d, d)


def test_the_law_that_the_chains_tend_to_is_the_posterior_up_to_its_known_bias():
    """An unadjusted chain of step s on ½·vᵀHv has exactly the mean H⁻¹h, and the covariance
    H⁻¹·(I − s²H/4)⁻¹; at 60 steps the test above is there to five digits.
    """
    for world in (gebm(60), latent(60)):
        world.hessian, world.pull = world.hessian[:LATENT, :LATENT], world.pull[:LATENT]
        mean, covariance = stationary(world)  # of the latent chain: of the image 0, held
        h = world.hessian
        exact = torch.linalg.inv(h)
        biased = exact @ torch.linalg.inv(torch.eye(LATENT).double() - SIZE**2 / 4 * h)
        torch.testing.assert_close(mean, exact @ world.pull)
        torch.testing.assert_close(covariance, biased)


def test_hat_s_bias_vanishes_with_the_square_of_its_step_size():
    world, errors = hat(1), []
    exact = torch.linalg.inv(world.hessian)
    for halvings in (2, 3):
        world.moves = [(rows, size / 2**halvings) for rows, size in hat(1).moves]
        mean, covariance = stationary(world)
        torch.testing.assert_close(mean, exact @ world.pull)
        errors.append(float((covariance - exact).norm()))
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)


@pytest.mark.parametrize("name", WORLDS)
@pytest.mark.parametrize("store", ["all", "checkpoints"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-10)])
def test_the_full_gradient_is_the_closed_form_jacobian(name, store, dtype, tolerance):
    world, dtype = WORLDS[name](40), getattr(torch, dtype)
    images, cotangent = normal(2, 1, SIDE, SIDE).sigmoid(), normal(2, 1, SIDE, SIDE, seed=1)
    full = Full(store=store).differentiate(
        world.purifier.to(dtype), images.to(dtype), keyed(2), 0.0
    )
    found = full.vjp(cotangent.to(dtype)).double().flatten(1)
    expected = cotangent.flatten(1) @ world.jacobian()
    torch.testing.assert_close(found, expected, rtol=0.0, atol=tolerance)
    assert float((expected - cotangent.flatten(1)).norm()) > 0.1


def networks(upper: int = 0):
    """Smooth networks of 8 × 8 pixels, none of them linear."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        shape = ConvSettings(latent=4, upper=upper, image_size=8, width=2)
        energy = ConvEnergy(
            ConvEnergySettings(channels=1, image_size=8, width=2, activation="silu")
        )
        prior = LatentEnergy(LatentEnergySettings(size=shape.size, hidden=8, stages=2))
        for weight in prior.parameters():  # fresh it is 0
            torch.nn.init.normal_(weight, std=0.5)
        made = energy, prior, ConvGenerator(shape), ConvEncoder(shape)
        for weight in (w for network in made for w in network.parameters()):
            weight.data *= 2  # fresh networks hardly depend on their input
    return [network.double().requires_grad_(False) for network in made]


def smooth(name: str):
    energy, prior, generator, encoder = networks(upper=2 if name == "two layers" else 0)
    make = {
        "hat": lambda: HatPurifier(energy, generator, encoder, 5, 0.3, 0.4, 1e-2, 0.2),
        "gebm": lambda: GEBMPurifier(energy, generator, encoder, 5, 0.4, 1e-2),
        "latent": lambda: LatentPurifier(prior, generator, encoder, 5, 0.2, 0.5),
        "two layers": lambda: LatentPurifier(prior, generator, encoder, 5, 0.2, 0.5),
        "no encoder": lambda: LatentPurifier(prior, generator, None, 5, 0.2, 0.5),
    }
    return make[name]()


def slope_of(value, at):
    """∂value/∂at with a graph, and not through what else depends on `at`."""
    alone = at.view_as(at) if at.requires_grad else at.clone().requires_grad_()
    return torch.autograd.grad(value(alone).sum(), alone, create_graph=True)[0]


def unrolled(purifier, images, noise):
    """The chain written out anew, with a graph through all of it."""
    x = 2 * images - 1
    generator, energy, s = purifier.generator, purifier.energy, purifier.step_size
    if purifier.encoder is None:
        z = torch.zeros(len(x), generator.settings.size).double()
    else:
        z = purifier.encoder(x)
    y, d = x - generator(z), z.shape[1]
    for k in range(purifier.steps):
        if isinstance(purifier, HatPurifier):
            draw = noise.normal(k, torch.cat([z, y.flatten(1)], dim=1).detach())
            t, latent_s = purifier.temperature, purifier.latent_step_size
            slope = slope_of(lambda z: energy(generator(z) + y) / t, z)  # noqa: B023
            z = z - latent_s**2 / 2 * slope + latent_s * draw[:, :d]
            slope = slope_of(lambda y: energy(generator(z) + y) / t, y)  # noqa: B023
            slope = slope + 2 * purifier.residual * y
            y = y - s**2 / 2 * slope + s * draw[:, d:].view_as(y)
        elif isinstance(purifier, GEBMPurifier):
            slope = slope_of(lambda z: energy(generator(z)) / purifier.temperature, z) + z
            z = z - s**2 / 2 * slope + s * noise.normal(k, z.detach())
        else:
            misfit = slope_of(lambda z: (x - generator(z)).flatten(1).square().sum(1) / 2, z)
            slope = slope_of(lambda z: energy(generator.latents(z)), z) + z
            slope = slope + misfit / purifier.sigma**2
            z = z - s**2 / 2 * slope + s * noise.normal(k, z.detach())
    x = generator(z) + y if isinstance(purifier, HatPurifier) else generator(z)
    return (x + 1) / 2


@pytest.mark.parametrize("name", ["hat", "gebm", "latent", "two layers", "no encoder"])
def test_the_full_gradient_through_smooth_networks_is_plain_autograd(name):
    purifier, images = smooth(name), normal(2, 1, 8, 8).sigmoid()
    cotangent = normal(2, 1, 8, 8, seed=5)
    full = Full(store="checkpoints").differentiate(purifier, images, keyed(2), 0.0)
    leaf = images.clone().requires_grad_()
    reference = unrolled(purifier, leaf, keyed(2))
    torch.testing.assert_close(full.images, reference.detach(), rtol=0.0, atol=1e-12)
    (expected,) = torch.autograd.grad(reference, leaf, cotangent)
    torch.testing.assert_close(full.vjp(cotangent), expected, rtol=1e-9, atol=1e-10)
    assert float(expected.norm()) > 1e-3


def test_a_hat_chain_of_no_steps_leaves_images_as_they_are():
    """Whatever the generator cannot make is in y, so that nothing is lost at the start."""
    energy, _, generator, encoder = networks()
    images = normal(2, 1, 8, 8).sigmoid()
    purified = HatPurifier(energy, generator, encoder, 0).purify(images, keyed(2))
    torch.testing.assert_close(purified, images)


def test_noise_depends_neither_on_the_batch_nor_on_how_steps_are_grouped():
    purifier, images = smooth("hat"), normal(3, 1, 8, 8).sigmoid()
    keys = keyed(3).keys
    together = purifier.purify(images, KeyedNoise(keys))
    alone = purifier.purify(images[1:2], KeyedNoise(keys[1:2]))
    torch.testing.assert_close(together[1:2], alone)
    x = purifier.enter(images)
    for k in range(purifier.steps):
        x = purifier.advance(x, KeyedNoise(keys), range(k, k + 1))
    assert torch.equal(purifier.leave(x), together)


@pytest.mark.parametrize("name", ["hat", "gebm", "latent"])
def test_weights_of_another_dtype_are_taken_in_the_images_own(name):
    purifier, images = smooth(name), normal(1, 1, 8, 8).sigmoid()
    wide = purifier.purify(images, keyed(1))
    narrow = purifier.float().purify(images, keyed(1))
    assert narrow.dtype == torch.float64
    torch.testing.assert_close(narrow, wide, rtol=0.0, atol=1e-5)


def test_a_shorter_chain_goes_as_far():
    purifier = smooth("hat")
    short = purifier.shortened(2)
    assert (short.steps, short.temperature) == (2, purifier.temperature)
    for name in ("step_size", "latent_step_size"):
        long, larger = getattr(purifier, name), getattr(short, name)
        assert 2 * larger**2 == pytest.approx(5 * long**2)
    with pytest.raises(UsageError, match="more than the defense's 5"):
        purifier.shortened(6)


@pytest.mark.parametrize(
    ("kind", "wrong", "said"),
    [
        (HatPurifier, {"steps": -1}, "0 or more, not -1"),
        (HatPurifier, {"step_size": 0.0}, "the step size of y"),
        (HatPurifier, {"latent_step_size": -0.1}, "latent_step_size and residual"),
        (GEBMPurifier, {"temperature": 0.0}, "temperature must be above 0"),
        (GEBMPurifier, {"step_size": "wide"}, "step_size must be a number"),
    ],
)
def test_impossible_settings_are_refused(kind, wrong, said):
    energy, _, generator, encoder = networks()
    with pytest.raises(UsageError, match=said):
        kind(energy, generator, encoder, **wrong)
