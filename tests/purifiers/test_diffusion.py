"""Diffusion purifiers on a Gaussian data distribution, whose best denoiser is known exactly."""

from __future__ import annotations

import math
import weakref
from itertools import pairwise

import pytest
import torch

from ebm_defense.attacks.gradients.registry import GRADIENTS
from ebm_defense.denoisers.base import Denoiser, cumulative
from ebm_defense.denoisers.schedules import SCHEDULES, betas
from ebm_defense.denoisers.unet import UNetDenoiser, UNetSettings
from ebm_defense.errors import UsageError
from ebm_defense.noise import KeyedNoise, chain_keys
from ebm_defense.purifiers.diffusion import DiffusionPurifier, LikelihoodPurifier

CHAINS, ERRORS = 10_000, 4.5
MEAN = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64)
ROOT = torch.tensor([[0.5, 0.0, 0.0], [0.2, 0.3, 0.0], [-0.1, 0.1, 0.6]], dtype=torch.float64)
COVARIANCE = ROOT @ ROOT.T
EYE = torch.eye(3, dtype=torch.float64)
IMAGE = torch.tensor([0.9, 0.1, 0.4], dtype=torch.float64)


class Gaussian(Denoiser):
    """E[ε | x_t] where x_0 ~ N(MEAN, COVARIANCE): √(1−ᾱ)·(ᾱΣ + (1−ᾱ)I)⁻¹·(x_t − √ᾱ·μ)."""

    def __init__(self, levels: int = 40):
        super().__init__()
        self.alphas = cumulative(betas("linear", levels, 0.002, 0.1))

    def slope(self, alpha: float) -> torch.Tensor:
        marginal = alpha * COVARIANCE + (1 - alpha) * EYE
        return math.sqrt(1 - alpha) * torch.linalg.inv(marginal)

    def forward(self, x, level):
        alphas = torch.tensor(self.alphas, dtype=x.dtype)[level]
        slopes = torch.stack([self.slope(float(a)) for a in alphas.unique()]).to(x.dtype)
        which = torch.searchsorted(alphas.unique(), alphas)
        away = x[:, :, 0, 0] - alphas.sqrt()[:, None] * MEAN.to(x.dtype)
        return torch.einsum("bij,bj->bi", slopes[which], away)[..., None, None]


def images(count: int = CHAINS) -> torch.Tensor:
    return IMAGE.view(1, 3, 1, 1).expand(count, -1, -1, -1).clone()


def keyed(count: int = CHAINS) -> KeyedNoise:
    return KeyedNoise(chain_keys(0, "diffusion", range(count), range(1))[0])


class Affine:
    """The law of x = J·x_start + mean + noise of this covariance, moved by affine steps."""

    def __init__(self):
        self.jacobian, self.mean, self.covariance = EYE, torch.zeros(3).double(), 0 * EYE

    def move(self, matrix, shift, variance):
        self.jacobian = matrix @ self.jacobian
        self.mean = matrix @ self.mean + shift
        self.covariance = matrix @ self.covariance @ matrix.T + variance * EYE


def exact_law(purifier: DiffusionPurifier) -> Affine:
    """Ho, Jain, Abbeel's posterior (eq. 7) for η = 1, the probability flow's step for η = 0."""
    denoiser, law = purifier.denoiser, Affine()
    first = denoiser.alphas[purifier.visited[0]]
    law.move(math.sqrt(first) * EYE, 0 * MEAN, 1 - first)
    for t, s in zip(purifier.visited, [*purifier.visited[1:], -1], strict=True):
        alpha, after = denoiser.alphas[t], denoiser.alphas[s] if s >= 0 else 1.0
        slope = denoiser.slope(alpha)
        shift = -math.sqrt(alpha) * slope @ MEAN
        to_image = (EYE - math.sqrt(1 - alpha) * slope) / math.sqrt(alpha)
        image_shift = -math.sqrt(1 - alpha) * shift / math.sqrt(alpha)
        if purifier.eta:
            beta = 1 - alpha / after
            of_image = math.sqrt(after) * beta / (1 - alpha)
            of_noisy = math.sqrt(alpha / after) * (1 - after) / (1 - alpha)
            variance = (1 - after) / (1 - alpha) * beta
            law.move(of_image * to_image + of_noisy * EYE, of_image * image_shift, variance)
        else:
            matrix = math.sqrt(after) * to_image + math.sqrt(1 - after) * slope
            law.move(matrix, math.sqrt(after) * image_shift + math.sqrt(1 - after) * shift, 0.0)
    return law


CASES = [(30, 30, 1.0), (30, 7, 1.0), (30, 30, 0.0), (30, 7, 0.0), (12, 1, 1.0)]


@pytest.mark.parametrize(("start", "steps", "eta"), CASES)
def test_purified_images_have_the_exact_mean_and_covariance(start, steps, eta):
    purifier = DiffusionPurifier(Gaussian(), start, steps, eta)
    ends = 2 * purifier.purify(images(), keyed())[:, :, 0, 0] - 1
    law = exact_law(purifier)
    mean = law.jacobian @ (2 * IMAGE - 1) + law.mean
    spread = law.covariance.diagonal().sqrt()
    assert ((ends.mean(0) - mean).abs() < ERRORS * spread / math.sqrt(CHAINS)).all()
    off = ends.T.cov() - law.covariance
    c = law.covariance
    error = ((c.diagonal()[:, None] * c.diagonal() + c**2) / CHAINS).sqrt()
    assert (off.abs() < ERRORS * error).all()


@pytest.mark.parametrize(("start", "steps", "eta"), CASES)
def test_the_full_gradient_is_the_closed_form_and_autograds(start, steps, eta):
    purifier = DiffusionPurifier(Gaussian(), start, steps, eta)
    x, noise = images(4), keyed(4)
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).double()
    full = GRADIENTS["full"](store="checkpoints")
    found = full.differentiate(purifier, x, noise, 0.0).vjp(upstream)
    closed = (upstream[:, :, 0, 0] @ exact_law(purifier).jacobian)[..., None, None]
    torch.testing.assert_close(found, closed, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found, by_autograd(purifier, x, noise, upstream))


def by_autograd(purifier, x, noise, upstream):
    x = x.clone().requires_grad_()
    ends = purifier.leave(purifier.advance(purifier.enter(x), noise, range(purifier.chain_steps)))
    return torch.autograd.grad(ends, x, upstream)[0]


@pytest.mark.parametrize(
    "purifier",
    [
        DiffusionPurifier(Gaussian(), 20, 5, guidance=0.7),
        DiffusionPurifier(Gaussian(), 20, 5, clip=True),
        LikelihoodPurifier(Gaussian(), 3, 0.5, 0.8),
    ],
    ids=["guided", "clipped", "likelihood"],
)
def test_the_full_gradient_goes_through_every_kind_of_step(purifier):
    x, noise = images(4), keyed(4)
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).double()
    found = GRADIENTS["full"]().differentiate(purifier, x, noise, 0.0).vjp(upstream)
    torch.testing.assert_close(found, by_autograd(purifier, x, noise, upstream))
    assert not torch.equal(found, upstream)


def test_guidance_draws_the_mean_towards_the_given_image_by_its_gradient():
    """One guided step, against the gradient that autograd finds of the squared distance."""
    plain = DiffusionPurifier(Gaussian(), 20, 2)
    guided = DiffusionPurifier(Gaussian(), 20, 2, guidance=0.7)
    x, noise = images(4), keyed(4)
    unguided = plain.advance(plain.enter(x), noise, range(1))
    moved = guided.advance(guided.enter(x), noise, range(1))["x"]
    alpha, after = (plain.denoiser.alphas[t] for t in plain.visited)
    variance = (1 - after) / (1 - alpha) * (1 - alpha / after)
    z, zeta = noise.normal(0, x), noise.normal(2, x)
    noisy = (math.sqrt(alpha) * (2 * x - 1) + math.sqrt(1 - alpha) * z).requires_grad_()
    target = math.sqrt(alpha) * (2 * x - 1) + math.sqrt(1 - alpha) * zeta
    (slope,) = torch.autograd.grad((noisy - target).square().sum(), noisy)
    expected = unguided - 0.7 * math.sqrt((1 - alpha) / alpha) * variance * slope
    torch.testing.assert_close(moved, expected)


def test_one_step_is_the_posterior_mean_of_the_image():
    """Denoised smoothing with the exact denoiser is Bayes' estimate from the noisy image."""
    purifier = DiffusionPurifier.one_shot(Gaussian(), 0.2)
    sigma = 2 * 0.2
    alpha = purifier.denoiser.alphas[purifier.start - 1]
    spreads = [abs(math.sqrt((1 - a) / a) - sigma) for a in purifier.denoiser.alphas]
    assert spreads[purifier.start - 1] == min(spreads)
    x, noise = images(5), keyed(5)
    noisy = (2 * x - 1 + math.sqrt((1 - alpha) / alpha) * noise.normal(0, x))[:, :, 0, 0]
    gain = COVARIANCE @ torch.linalg.inv(COVARIANCE + (1 - alpha) / alpha * EYE)
    expected = MEAN + (noisy - MEAN) @ gain.T
    torch.testing.assert_close(2 * purifier.purify(x, noise)[:, :, 0, 0] - 1, expected)


def test_a_likelihood_step_follows_the_closed_form_slope():
    purifier = LikelihoodPurifier(Gaussian(), 1, 0.3, 100.0, low=0.2, high=0.9)
    x, noise = images(6), keyed(6)
    uniform = 0.5 * (1 + torch.erf(noise.normal(0, x[:, :1]).flatten() / math.sqrt(2)))
    levels = ((0.2 + 0.7 * uniform) * 40).long()
    assert len(levels.unique()) > 1
    start, z = (2 * x - 1)[:, :, 0, 0], noise.normal(1, x)[:, :, 0, 0]
    slopes = []
    for i, t in enumerate(levels):
        alpha = purifier.denoiser.alphas[t]
        matrix = purifier.denoiser.slope(alpha)
        noisy = math.sqrt(alpha) * start[i] + math.sqrt(1 - alpha) * z[i]
        missed = matrix @ (noisy - math.sqrt(alpha) * MEAN) - z[i]
        slopes.append(2 * math.sqrt(alpha) * matrix @ missed)
    direction = torch.stack(slopes)
    expected = start - 0.3 * direction / direction.norm(dim=1, keepdim=True)
    torch.testing.assert_close(2 * purifier.purify(x, noise)[:, :, 0, 0] - 1, expected)


def test_likelihood_steps_stay_in_their_ball_and_find_likelier_images():
    purifier = LikelihoodPurifier(Gaussian(), 20, 0.1, 0.9, momentum=0.5)
    x = images(500)
    ends = (2 * purifier.purify(x, keyed(500)) - 1)[:, :, 0, 0]
    away = (ends - (2 * IMAGE - 1)).norm(dim=1)
    assert float(away.max()) <= 0.9 + 1e-9

    def unlikely(y):
        return ((y - MEAN) @ torch.linalg.inv(COVARIANCE) * (y - MEAN)).sum(-1)

    assert float(unlikely(ends).mean()) < 0.5 * float(unlikely(2 * IMAGE - 1))


TINY = UNetSettings(
    channels=1, out_channels=1, image_size=8, block_out_channels=(8, 8), layers_per_block=1,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"), norm_num_groups=4,
)  # fmt: skip


def unet() -> UNetDenoiser:
    torch.manual_seed(0)
    return UNetDenoiser(TINY)


@pytest.mark.parametrize("name", SCHEDULES)
def test_noise_levels_are_those_of_diffusers(name):
    from diffusers import DDPMScheduler

    theirs = DDPMScheduler(1000, beta_schedule=name, beta_start=1e-4, beta_end=0.02)
    ours = torch.tensor(cumulative(betas(name, 1000, 1e-4, 0.02)))
    torch.testing.assert_close(ours, theirs.alphas_cumprod, rtol=2e-4, atol=1e-7)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_reverse_steps_are_those_of_diffusers(eta, clip):
    """DDIM's scheduler takes the noise that it is given; with η = 1 it is DDPM's small variance."""
    from diffusers import DDIMScheduler, DDPMScheduler

    purifier = DiffusionPurifier(unet(), 200, 200, eta, clip=clip)
    theirs = DDIMScheduler(1000, clip_sample=clip, set_alpha_to_one=True)
    theirs.set_timesteps(1000)
    ddpm = DDPMScheduler(1000, clip_sample=clip, variance_type="fixed_small")
    x, noise = 2 * torch.rand(3, 1, 8, 8), keyed(3)
    with torch.no_grad():
        for t in purifier.visited[:3] + purifier.visited[-2:]:
            k = purifier.visited.index(t)
            at = x if k else 2 * x - 1
            found = purifier.advance(at, noise, range(k, k + 1))
            if k == 0:
                at = theirs.add_noise(at, noise.normal(0, at), torch.tensor([t] * 3))
            told = purifier.denoiser.unet(at, t).sample
            z = noise.normal(1 + 2 * k, at)
            step = theirs.step(
                told, t, at, eta=eta, variance_noise=z, use_clipped_model_output=True
            )
            torch.testing.assert_close(found, step.prev_sample, rtol=1e-4, atol=2e-5)
            if eta == 1.0:
                generator = torch.Generator().manual_seed(0)
                drawn = torch.randn(at.shape, generator=torch.Generator().manual_seed(0))
                mean = found - math.sqrt(_variance(purifier, k)) * z
                expected = ddpm.step(told, t, at, generator=generator).prev_sample
                ours = mean + math.sqrt(_variance(purifier, k)) * drawn
                torch.testing.assert_close(ours, expected, rtol=1e-4, atol=2e-5)


def _variance(purifier, k):
    alphas = purifier.denoiser.alphas
    alpha, after = alphas[purifier.visited[k]], [*purifier.visited, -1][k + 1]
    after = alphas[after] if after >= 0 else 1.0
    return (1 - after) / (1 - alpha) * (1 - alpha / after)


def test_few_steps_are_spread_from_the_start_to_the_last_level():
    for start, steps in ((100, 100), (100, 7), (100, 2), (3, 2), (1000, 999)):
        visited = DiffusionPurifier(unet(), start, steps).visited
        assert len(set(visited)) == steps
        assert (visited[0], visited[-1]) == (start - 1, 0)
        gaps = {a - b for a, b in pairwise(visited)}
        assert max(gaps) - min(gaps) <= 1
    assert DiffusionPurifier(unet(), 30, 1).visited == [29]


class Counted(UNetDenoiser):
    """Counts its calls."""

    calls = 0

    def forward(self, x, level):
        self.calls += 1
        return super().forward(x, level)


class Saved:
    """A tensor that a graph keeps."""

    def __init__(self, tensor):
        self.tensor = tensor


def test_the_full_gradient_holds_the_graph_of_one_step_however_many_there_are():
    torch.manual_seed(0)
    denoiser = Counted(TINY).requires_grad_(False)
    x, noise = torch.rand(2, 1, 8, 8), keyed(2)
    most = {}
    for steps in (5, 40):
        purifier = DiffusionPurifier(denoiser, 40, steps)
        denoiser.calls, alive, sizes = 0, weakref.WeakSet(), []

        def pack(tensor, alive=alive, sizes=sizes):
            saved = Saved(tensor)
            alive.add(saved)
            sizes.append(sum(s.tensor.numel() for s in alive))
            return saved

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
            chain = GRADIENTS["full"]().differentiate(purifier, x, noise, 0.0)
            assert not sizes  # on the way there no graph is made
            assert denoiser.calls == steps
            chain.vjp(torch.ones_like(x))
        assert denoiser.calls == 2 * steps + 1  # once more on the way back; the end is replayed
        most[steps] = max(sizes)
    assert most[5] == most[40]


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_whatever_a_network_tells_is_turned_into_noise(prediction):
    from ebm_defense.denoisers.base import noise_in

    generator = torch.Generator().manual_seed(0)
    image, noise = (torch.randn(2, 1, 4, 4, generator=generator) for _ in range(2))
    alpha = torch.tensor([0.9, 0.2]).view(-1, 1, 1, 1)
    x = alpha.sqrt() * image + (1 - alpha).sqrt() * noise
    told = {
        "epsilon": noise,
        "sample": image,
        "v_prediction": alpha.sqrt() * noise - (1 - alpha).sqrt() * image,
    }
    torch.testing.assert_close(noise_in(told[prediction], x, alpha, prediction), noise)


def test_a_surrogate_takes_fewer_steps_from_the_same_level():
    purifier = DiffusionPurifier(Gaussian(), 30, 30, eta=0.5)
    cheap = purifier.shortened(6)
    assert (cheap.start, cheap.steps, cheap.eta) == (30, 6, 0.5)
    with pytest.raises(UsageError, match="give it fewer"):
        cheap.shortened(7)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"start": 0}, "from 1 to the 40 levels"),
        ({"start": 41}, "from 1 to the 40 levels"),
        ({"start": 10, "steps": 11}, "from 1 to start"),
        ({"start": 10, "steps": 0}, "from 1 to start"),
        ({"start": 10, "steps": 2, "eta": 1.5}, "eta must lie"),
        ({"start": 10, "steps": 2, "guidance": -1.0}, "guidance be 0 or more"),
        ({"start": 10, "steps": 2, "eta": 0.0, "guidance": 1.0}, "eta must be above 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, words):
    with pytest.raises(UsageError, match=words):
        DiffusionPurifier(Gaussian(), **settings)


@pytest.mark.parametrize(
    "settings", [{"steps": 0}, {"low": 0.5, "high": 0.5}, {"step_size": 0.0}, {"radius": -1.0}]
)
def test_likelihood_settings_out_of_range_are_refused(settings):
    with pytest.raises(UsageError, match="not"):
        LikelihoodPurifier(Gaussian(), **settings)
