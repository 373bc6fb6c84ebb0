"""The full gradient is exact: closed forms, plain autograd through the unrolled chain."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ebm_defense import (
    ConvEnergy,
    ConvEnergySettings,
    LangevinPurifier,
    PurifiedClassifier,
    Purifier,
    QuadraticEnergy,
    UsageError,
)
from ebm_defense.attacks import PGD, CrossEntropy, Full, Identity, ThreatModel
from ebm_defense.attacks.gradients.chains import groups_of
from ebm_defense.engine.derivatives import arithmetic, hessian_product, vjp
from ebm_defense.eval import evaluate
from ebm_defense.noise import KeyedNoise, chain_keys
from ebm_defense.purifiers.base import SteppedPurifier
from ebm_defense.purifiers.baselines import GaussianNoise, NoPurifier
from ebm_defense.purifiers.registry import baseline

DRIFT_STEP, TEMPERATURE = 0.3, 0.5  # a drift of 0.09


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


def curvature(size: int) -> torch.Tensor:
    """An A far from diagonal, with eigenvalues from 0.0004 to 4: a condition number of 10,000."""
    q, _ = torch.linalg.qr(normal(size, size, seed=1))
    return q @ torch.diag(torch.logspace(-3.4, 0.6, size, dtype=torch.float64)) @ q.T


def behind(purifier: Purifier, size: int = 4, **options) -> PurifiedClassifier:
    """A linear classifier of three classes behind a purifier of `size` pixels."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        classifier = nn.Sequential(nn.Flatten(), nn.Linear(size, 3, dtype=torch.float64))
    return PurifiedClassifier(classifier, purifier, replicates=2, seed=0, **options)


def quadratic(steps: int, dtype: torch.dtype = torch.float64, **options) -> PurifiedClassifier:
    energy = QuadraticEnergy(normal(1, 2, 2, seed=2).to(dtype), curvature(4).to(dtype))
    chain = {"steps": steps, "step_size": DRIFT_STEP, "temperature": TEMPERATURE}
    return behind(LangevinPurifier(energy, **chain, precision="fp32"), **options)


def conv(steps: int, activation: str = "soft_lrelu", **options) -> PurifiedClassifier:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        shape = ConvEnergySettings(channels=1, image_size=8, width=4, activation=activation)
        energy = ConvEnergy(shape).double().requires_grad_(False)
    # At this temperature the chain's Jacobian is far from the identity.
    return behind(LangevinPurifier(energy, steps, 0.1, 1e-4), size=64, **options)


def purified(gradient, defense, images, seed: int = 0):
    keys = chain_keys(seed, "test", range(len(images)), range(2))
    return gradient.purify(defense, images, keys), keys


@pytest.mark.parametrize("store", ["all", "checkpoints"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=str
)
@pytest.mark.parametrize("steps", [0, 1, 7, 50])
def test_on_a_quadratic_energy_it_is_the_matrix_power(steps, dtype, tolerance, store):
    assert_matrix_power(steps, dtype, tolerance, store)


@pytest.mark.parametrize(
    ("dtype", "tolerance", "store"),
    [(torch.float32, 1e-5, "all"), (torch.float64, 1e-10, "checkpoints")],
    ids=str,
)
def test_it_stays_the_matrix_power_through_two_thousand_steps(dtype, tolerance, store):
    assert_matrix_power(2000, dtype, tolerance, store)


def assert_matrix_power(steps, dtype, tolerance, store):
    defense = quadratic(steps, dtype)
    found, _ = purified(Full(store=store), defense, normal(2, 1, 2, 2, seed=3).to(dtype))
    cotangent = normal(2, 2, 1, 2, 2, seed=4).to(dtype)
    step = torch.eye(4).double() - defense.purifier.settings.drift * curvature(4)
    jacobian = torch.linalg.matrix_power(step, steps)
    expected = cotangent.double().flatten(2) @ jacobian
    pulled = found.vjp(cotangent).double().flatten(2)
    torch.testing.assert_close(pulled, expected, rtol=0.0, atol=tolerance)


def unrolled(purifier: LangevinPurifier, images, keys):
    """The chain written out anew, with a graph through all of it."""
    noise, s = KeyedNoise(keys), purifier.settings
    x = 2.0 * images - 1.0
    for k in range(s.steps):
        (slope,) = torch.autograd.grad(purifier.energy(x).sum(), x, create_graph=True)
        x = x - s.step_size**2 / 2 / s.temperature * slope
        x = x + s.step_size * noise.normal(k, x.detach())
    return (x + 1.0) / 2.0


@pytest.mark.parametrize("store", ["all", "checkpoints"])
@pytest.mark.parametrize("steps", [1, 5, 20])
def test_on_a_smooth_network_it_is_plain_autograd(steps, store):
    defense, images = conv(steps), normal(3, 1, 8, 8).sigmoid()
    found, keys = purified(Full(store=store), defense, images)
    cotangent = normal(2, 3, 1, 8, 8, seed=5)
    for r in range(2):
        leaf = images.clone().requires_grad_()
        reference = unrolled(defense.purifier, leaf, keys[r])
        torch.testing.assert_close(found.images[r], reference.detach(), rtol=0.0, atol=1e-12)
        (expected,) = torch.autograd.grad(reference, leaf, cotangent[r])
        torch.testing.assert_close(found.vjp(cotangent)[r], expected, rtol=1e-9, atol=1e-9)
        if steps == 20:
            assert float((expected - cotangent[r]).norm() / cotangent[r].norm()) > 0.1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("store", ["all", "checkpoints"])
def test_the_forward_chain_is_the_defenses_own_to_the_last_bit(shipped, sample, store, precision):
    shipped.purifier.precision = precision
    found, keys = purified(Full(store=store), shipped, sample.images[:3])
    with torch.no_grad():
        assert torch.equal(found.images, shipped.purify_replicates(sample.images[:3], keys))


@settings(max_examples=12)
@given(
    steps=st.integers(0, 17),
    images=st.integers(1, 3),
    max_chains=st.integers(1, 7),
    store=st.sampled_from(["all", "checkpoints"]),
)
def test_neither_chunks_nor_storage_change_the_gradient(steps, images, max_chains, store):
    x, cotangent = normal(3, 1, 2, 2).sigmoid()[:images], normal(2, 3, 1, 2, 2)[:, :images]
    whole, _ = purified(Full(), quadratic(steps), x)
    parts, _ = purified(Full(store=store), quadratic(steps, max_chains=max_chains), x)
    torch.testing.assert_close(parts.images, whole.images, rtol=0.0, atol=1e-12)
    torch.testing.assert_close(parts.vjp(cotangent), whole.vjp(cotangent), rtol=0.0, atol=1e-12)


def test_an_images_gradient_does_not_depend_on_those_beside_it():
    defense, x, labels = conv(4), normal(3, 1, 8, 8).sigmoid(), torch.tensor([0, 1, 2])
    keys = chain_keys(0, "test", range(3), range(2))
    together = Full()(defense, x, labels, keys, CrossEntropy())
    alone = Full()(defense, x[1:2], labels[1:2], keys[:, 1:2], CrossEntropy())
    torch.testing.assert_close(together.gradient[1:2], alone.gradient, rtol=0.0, atol=1e-12)
    torch.testing.assert_close(together.logits[:, 1:2], alone.logits, rtol=0.0, atol=1e-12)


def test_it_works_whatever_grad_mode_the_caller_is_in_and_leaves_weights_without_gradients():
    defense, x, labels = conv(3), normal(2, 1, 8, 8).sigmoid(), torch.tensor([0, 1])
    defense.requires_grad_(True)
    keys = chain_keys(0, "test", range(2), range(2))
    plain = Full()(defense, x, labels, keys, CrossEntropy()).gradient
    with torch.no_grad():
        quiet = Full()(defense, x, labels, keys, CrossEntropy()).gradient
    with torch.inference_mode():
        found, _ = purified(Full(), defense, x)
        assert torch.isfinite(found.vjp(torch.ones(2, 2, 1, 8, 8).double())).all()
    assert torch.equal(plain, quiet)
    assert all(p.grad is None for p in defense.parameters())


def test_the_callers_autocast_takes_no_digits_from_the_products():
    defense = conv(4)
    defense.float()
    x, cotangent = normal(2, 1, 8, 8).sigmoid().float(), normal(2, 2, 1, 8, 8).float()
    found, _ = purified(Full(), defense, x)
    exact = found.vjp(cotangent)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(found.vjp(cotangent), exact)
    coarse, _ = purified(Full(precision="bf16"), defense, x)
    off = (coarse.vjp(cotangent) - exact).norm() / (exact - cotangent).norm()
    assert 1e-4 < float(off) < 0.2


def test_a_chain_that_diverges_has_a_nan_gradient_and_leaves_the_others_theirs():
    defense, images = quadratic(9), normal(2, 1, 2, 2).sigmoid()
    cotangent = normal(2, 2, 1, 2, 2, seed=1)
    whole, _ = purified(Full(), defense, images)
    images[0] = float("nan")
    found = purified(Full(store="checkpoints"), defense, images)[0].vjp(cotangent)
    assert torch.equal(found[:, 1], whole.vjp(cotangent)[:, 1])


def test_a_hessian_product_is_zero_where_there_is_no_curvature():
    x, v = normal(2, 1, 8, 8), normal(2, 1, 8, 8, seed=1)
    for energy in (conv(1, "leaky_relu").purifier.energy, lambda x: x.flatten(1).sum(1)):
        assert torch.equal(hessian_product(energy, x, v), torch.zeros_like(x))


def test_on_a_leaky_relu_network_it_is_the_identity():
    images = normal(2, 1, 8, 8).sigmoid()
    found, _ = purified(Full(), conv(9, "leaky_relu"), images)
    cotangent = normal(2, 2, 1, 8, 8, seed=1)
    assert torch.equal(found.vjp(cotangent), cotangent)


class Drifting(nn.Module):
    """An energy that is another one at every call."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return (1.0 + 1e-3 * self.calls) * x.square().flatten(1).sum(1)


class Dithering(Purifier):
    """A differentiable purifier that is not a function of its noise."""

    differentiable = True
    calls = 0

    def purify(self, images, noise):
        self.calls += 1
        return images + 0.01 * self.calls


@pytest.mark.parametrize("store", ["all", "checkpoints"])
def test_an_impure_energy_is_a_replay_mismatch(store):
    defense = behind(LangevinPurifier(Drifting(), 9, 0.1, 0.5))
    found, _ = purified(Full(store=store), defense, normal(2, 1, 2, 2))
    with pytest.raises(UsageError, match="replay mismatch"):
        found.vjp(torch.ones(2, 2, 1, 2, 2).double())


def test_an_impure_map_is_a_replay_mismatch_too_unless_it_is_tolerated():
    images, cotangent = normal(2, 1, 2, 2).sigmoid(), normal(2, 2, 1, 2, 2, seed=1)
    found, _ = purified(Full(), behind(Dithering()), images)
    with pytest.raises(UsageError, match="replay mismatch"):
        found.vjp(cotangent)
    found, _ = purified(Full(replay_tolerance=0.1), behind(Dithering()), images)
    assert torch.equal(found.vjp(cotangent), cotangent)


@pytest.mark.parametrize("purifier", [NoPurifier(), GaussianNoise(0.1)], ids=str)
def test_the_exact_gradient_of_added_noise_is_the_identity(purifier):
    defense, x, labels = behind(purifier), normal(2, 1, 2, 2).sigmoid(), torch.tensor([0, 1])
    keys = chain_keys(0, "test", range(2), range(2))
    full, bpda = (g(defense, x, labels, keys, CrossEntropy()) for g in (Full(), Identity()))
    torch.testing.assert_close(full.gradient, bpda.gradient)
    assert torch.equal(full.logits, bpda.logits)


class Squash(Purifier):
    """A map that torch can differentiate, and no chain."""

    stochastic, differentiable = False, True

    def purify(self, images, noise):
        return images.sin()


class Spin(SteppedPurifier):
    """Steps that torch can differentiate, in a state of its own, with noise that scales it."""

    chain_steps = 5

    def enter(self, images):
        return 3.0 * images

    def leave(self, x):
        return x.square()

    def advance(self, x, noise, steps):
        for k in steps:
            x = x.sin() * (1.0 + 0.1 * noise.normal(k, x.detach()))
        return x


@pytest.mark.parametrize("purifier", [Squash(), Spin()])
@pytest.mark.parametrize("store", ["all", "checkpoints"])
def test_a_foreign_differentiable_purifier_is_differentiated(purifier, store):
    images, cotangent = normal(2, 1, 2, 2).sigmoid(), normal(2, 2, 1, 2, 2, seed=1)
    found, keys = purified(Full(store=store), behind(purifier), images)
    for r in range(2):
        leaf = images.clone().requires_grad_()
        reference = purifier.purify(leaf, KeyedNoise(keys[r]))
        (expected,) = torch.autograd.grad(reference, leaf, cotangent[r])
        torch.testing.assert_close(found.images[r], reference.detach())
        torch.testing.assert_close(found.vjp(cotangent)[r], expected)


@pytest.mark.parametrize("spec", ["jpeg:75", "bits:3", "tv:0.1", "median:3"])
def test_a_purifier_without_a_gradient_is_refused_before_any_work(spec):
    purifier = baseline(spec)
    purifier.filter = purifier.purify = None  # whatever runs would fail
    attack = PGD(gradient=Full(), steps=1)
    with pytest.raises(UsageError, match="use the gradient Identity"):
        attack.chain_steps(behind(purifier))
    with pytest.raises(UsageError, match="use the gradient Identity"):
        purified(Full(), behind(purifier), normal(1, 1, 2, 2).sigmoid())


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"store": "some"}, "store is 'some'"),
        ({"precision": "fp8"}, "fp32, bf16"),
        ({"memory": 0.0}, "memory"),
        ({"replay_tolerance": -1.0}, "replay_tolerance"),
    ],
)
def test_impossible_settings_are_refused(wrong, said):
    with pytest.raises(UsageError, match=said):
        Full(**wrong)


@given(st.integers(0, 400), st.integers(1, 9), st.integers(0, 30))
def test_groups_hold_every_step_once_and_in_order(steps, stride, stored):
    groups = groups_of(steps, stride, stored)
    assert [k for group in groups for block in group for k in block] == list(range(steps))
    assert len(groups) <= max(stored, 1)
    assert all(len(block) <= stride for group in groups for block in group)


def states_held(store: str, memory: float = 4.0) -> int:
    """How many states a chain of 100 steps keeps."""
    defense, noise = quadratic(100), KeyedNoise(torch.tensor([1]))
    walk = Full(store=store, memory=memory).differentiate(
        defense.purifier, normal(1, 1, 2, 2), noise, 32.0
    )
    return len(walk.vjp.__closure__[0].cell_contents.kept)


def test_it_keeps_all_states_or_the_square_root_of_them_as_memory_allows():
    assert states_held("all") == 100
    assert states_held("checkpoints") == 10
    assert states_held("auto") == 100
    assert states_held("auto", memory=1e-6) == 10


@pytest.mark.parametrize("purifier", [quadratic(3).purifier, NoPurifier()])
def test_of_no_images_there_is_an_empty_gradient(purifier):
    found, _ = purified(Full(), behind(purifier), normal(0, 1, 2, 2))
    assert found.images.shape == found.vjp(found.images).shape == (2, 0, 1, 2, 2)


def test_it_states_its_cost():
    defense = quadratic(40)
    products = Full().chain_steps(defense) - 40
    assert 2 * 40 <= products <= 4 * 40
    assert Full(store="checkpoints").chain_steps(defense) == 2 * 40 + products


def test_vjp_and_products_work_on_inference_tensors():
    energy = quadratic(1).purifier.energy
    with torch.inference_mode():
        x, v = normal(2, 1, 2, 2), normal(2, 1, 2, 2, seed=1)
        torch.testing.assert_close(vjp(torch.sin, x, v), x.cos() * v)
        expected = (v.flatten(1) @ curvature(4)).view_as(v)
        torch.testing.assert_close(hessian_product(energy, x, v), expected)


def test_arithmetic_overrules_a_surrounding_autocast():
    x = torch.ones(2, 2)
    with torch.autocast("cpu", torch.bfloat16), arithmetic("fp32", x.device):
        assert (x @ x).dtype == torch.float32
    with arithmetic("bf16", x.device):
        assert (x @ x).dtype == torch.bfloat16


# The known robust accuracy. The classifier's weight lies almost wholly in directions that the
# chain forgets; the little of it that the chain keeps decides. The identity's gradient points at
# the part that is forgotten, the exact one at the part that stays.
EPS, SIDE, STEPS, MANY = 0.1, 4, 30, 40


def forgetful_world(two_class):
    """A linear margin behind a chain with J = (I − drift·A)^K, and J·w in [0, 1] units."""
    q, _ = torch.linalg.qr(normal(SIDE**2, SIDE**2, seed=6))
    kept = torch.arange(SIDE**2) < 4
    values = torch.where(kept, 1e-3, 1.0).double()
    step_size, temperature = 1e-3, 2.5e-6  # a drift of 0.2, and hardly any noise
    weight = q @ torch.where(kept, 0.15, 1.0).double()
    energy = QuadraticEnergy(torch.zeros(1, SIDE, SIDE).double(), q @ torch.diag(values) @ q.T)
    purifier = LangevinPurifier(energy, STEPS, step_size, temperature)
    pulled = q @ torch.diag((1 - 0.2 * values) ** STEPS) @ q.T @ weight
    mean = torch.full((SIDE**2,), 0.5).double()
    bias = -float(weight @ mean)
    return PurifiedClassifier(two_class(weight.view(1, SIDE, SIDE), bias), purifier), pulled


def test_it_finds_the_known_robust_accuracy_that_the_identity_misses(two_class):
    defense, pulled = forgetful_world(two_class)
    damage = EPS * float(pulled.abs().sum())
    margins = damage * torch.linspace(0.02, 1.98, MANY, dtype=torch.float64)
    labels = torch.arange(MANY) % 2
    sign = 2.0 * labels - 1.0
    # Images 0.5 + t·(J·w) have the mean margin t·|J·w|², eps inside the pixel box.
    scale = (sign * margins / pulled.square().sum()).view(-1, 1, 1, 1)
    images = 0.5 + scale * pulled.view(1, 1, SIDE, SIDE)
    assert EPS < float(images.min()) < float(images.max()) < 1 - EPS
    truth = float((margins > damage).double().mean())

    def robust(gradient) -> float:
        threat = ThreatModel(eps=EPS)
        attack = PGD(threat=threat, steps=6, step_size=EPS, replicates=2, gradient=gradient)
        report = evaluate(defense, images, labels, attacks=[attack], judge_replicates=16)
        assert report.records["clean"].all()
        return report.robust().value

    assert robust(Full()) == pytest.approx(truth)
    assert robust(Identity()) >= truth + 0.2
