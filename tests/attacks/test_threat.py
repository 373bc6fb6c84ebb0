"""Threat models: nothing an attacker does with them leaves them."""

import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ebm_defense import UsageError
from ebm_defense.attacks import ThreatModel
from ebm_defense.attacks.norms import NORMS
from ebm_defense.attacks.threat import fraction
from ebm_defense.noise import KeyedNoise

SEEDS = st.integers(0, 2**31)
NAMES = st.sampled_from(list(NORMS))
SHAPES = st.tuples(st.integers(1, 3), st.sampled_from([1, 3]), st.integers(1, 6), st.integers(1, 6))
ROUNDING = 1e-6
MOST = {"Linf": 1.0, "L2": 3.0, "L1": 3.0}
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


class Case(NamedTuple):
    threat: ThreatModel
    origin: Tensor
    x: Tensor


@st.composite
def cases(draw) -> Case:
    """A threat model, originals with pixels on the box's sides, and points near and far."""
    generator = torch.Generator().manual_seed(draw(SEEDS))
    shape = draw(SHAPES)
    origin = (1.4 * torch.rand(shape, generator=generator) - 0.2).clamp(0.0, 1.0)
    reach = draw(st.floats(0.0, 10.0))
    x = origin + reach * torch.randn(shape, generator=generator)
    norm = draw(NAMES)
    return Case(ThreatModel(norm=norm, eps=draw(st.floats(1e-3, MOST[norm]))), origin, x)


def keys(seed: int, count: int) -> Tensor:
    return torch.randint(2**62, (count,), generator=torch.Generator().manual_seed(seed))


def obeys(threat: ThreatModel, x: Tensor, origin: Tensor) -> bool:
    near = threat.size(x, origin) <= threat.eps * (1.0 + ROUNDING) + ROUNDING
    return bool(near.all()) and float(x.min()) >= 0.0 and float(x.max()) <= 1.0


@given(cases())
def test_a_projection_obeys_the_threat_model(case):
    assert obeys(case.threat, case.threat.project(case.x, case.origin), case.origin)


@given(cases())
def test_projecting_twice_is_projecting_once(case):
    once = case.threat.project(case.x, case.origin)
    torch.testing.assert_close(
        case.threat.project(once, case.origin), once, rtol=ROUNDING, atol=ROUNDING
    )


@given(cases(), st.floats(0.0, 1.0))
def test_a_point_within_the_threat_model_stays_where_it_is(case, share):
    inside = (1.0 - share) * case.origin + share * case.threat.project(case.x, case.origin)
    torch.testing.assert_close(
        case.threat.project(inside, case.origin), inside, rtol=ROUNDING, atol=ROUNDING
    )


@given(cases())
def test_a_linf_projection_is_the_nearest_point(case):
    eps = min(case.threat.eps, 1.0)
    low, high = (case.origin - eps).clamp(min=0.0), (case.origin + eps).clamp(max=1.0)
    found = ThreatModel(norm="Linf", eps=eps).project(case.x, case.origin)
    torch.testing.assert_close(found, case.x.clamp(low, high), rtol=ROUNDING, atol=ROUNDING)


@given(SEEDS, st.floats(1e-3, 0.1), st.floats(0.2, 50.0))
def test_an_l2_projection_keeps_the_direction_and_reaches_the_sphere(seed, eps, reach):
    generator = torch.Generator().manual_seed(seed)
    origin = torch.full((2, 1, 4, 4), 0.5)
    delta = torch.randn(origin.shape, generator=generator)
    delta *= reach / delta.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    found = ThreatModel(norm="L2", eps=eps).project(origin + delta, origin) - origin
    torch.testing.assert_close(found, delta * (eps / reach), rtol=1e-4, atol=ROUNDING)


def bisected_l1(x: Tensor, origin: Tensor, eps: float) -> Tensor:
    """The nearest point of the L1 ball in the box, by bisection on what every pixel gives up."""
    delta, origin = (x - origin).double().flatten(1), origin.double().flatten(1)

    def shrunk(given: Tensor) -> Tensor:
        soft = delta.sign() * (delta.abs() - given).clamp_min(0.0)
        return soft.clamp(-origin, 1.0 - origin)

    low = torch.zeros(len(delta), 1).double()
    high = low + delta.abs().max() + 1.0
    if eps >= float(shrunk(low).abs().sum(1).max()):
        return (origin + shrunk(low)).view_as(x)
    for _ in range(50):
        middle = (low + high) / 2.0
        over = shrunk(middle).abs().sum(1, keepdim=True) > eps
        low, high = torch.where(over, middle, low), torch.where(over, high, middle)
    inside = shrunk(torch.zeros_like(low)).abs().sum(1, keepdim=True) <= eps
    return (origin + shrunk(torch.where(inside, 0.0, high))).view_as(x)


@settings(max_examples=30)
@given(cases())
def test_an_l1_projection_is_the_nearest_point(case):
    eps = case.threat.eps
    found = ThreatModel(norm="L1", eps=eps).project(case.x, case.origin)
    expected = bisected_l1(case.x, case.origin, eps).float()
    torch.testing.assert_close(found, expected, rtol=ROUNDING, atol=ROUNDING)


@settings(max_examples=30)
@given(cases(), SEEDS, st.floats(0.0, 1.0))
def test_no_point_within_the_l1_threat_model_is_nearer_than_the_projection(case, seed, share):
    threat = ThreatModel(norm="L1", eps=case.threat.eps)
    found = threat.project(case.x, case.origin)
    other = threat.random_start(case.origin, KeyedNoise(keys(seed, len(case.origin))))
    between = share * found + (1.0 - share) * other
    far, near = ((y - case.x).double().flatten(1).norm(dim=1) for y in (between, found))
    assert bool((near <= far + ROUNDING * (1.0 + far)).all())


@settings(max_examples=30)
@given(SEEDS, st.floats(0.01, 30.0))
def test_a_sparse_step_is_the_steepest_that_its_pixels_have_room_for(seed, size):
    generator = torch.Generator().manual_seed(seed)
    x = (1.4 * torch.rand((1, 3, 10, 10), generator=generator) - 0.2).clamp(0.0, 1.0)
    gradient = torch.randn(x.shape, generator=generator)
    room = torch.where(gradient > 0, 1.0 - x, x)
    step = NORMS["L1"].steepest(gradient, size, room)
    for g, s, r in zip(gradient.flatten(1), step.flatten(1), room.flatten(1), strict=True):
        left, expected = size, torch.zeros(300)
        for i in g.abs().argsort(descending=True).tolist():
            move = min(left, float(r[i]), size / 3)
            left -= move
            expected[i] = move * g[i].sign()
        torch.testing.assert_close(s, expected, rtol=1e-4, atol=1e-5)


@given(cases(), SEEDS, st.floats(1e-3, 10.0))
def test_a_step_obeys_the_threat_model(case, seed, step_size):
    x = case.threat.project(case.x, case.origin)
    gradient = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    assert obeys(case.threat, case.threat.step(x, case.origin, gradient, step_size), case.origin)


@given(cases(), SEEDS)
def test_a_start_obeys_the_threat_model(case, seed):
    noise = KeyedNoise(keys(seed, len(case.origin)))
    assert obeys(case.threat, case.threat.random_start(case.origin, noise), case.origin)


@given(NAMES, SEEDS, st.permutations(range(4)))
def test_a_start_depends_on_its_images_key_only(norm, seed, order):
    threat = ThreatModel(norm=norm, eps=0.1)
    origin = torch.rand((4, 1, 5, 5), generator=torch.Generator().manual_seed(seed))
    own = keys(seed, 4)
    together = threat.random_start(origin, KeyedNoise(own))
    shuffled = threat.random_start(origin[list(order)], KeyedNoise(own[list(order)]))
    alone = threat.random_start(origin[:1], KeyedNoise(own[:1]))
    torch.testing.assert_close(shuffled, together[list(order)], rtol=ROUNDING, atol=ROUNDING)
    torch.testing.assert_close(alone, together[:1], rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("norm", NORMS)
def test_starts_of_other_keys_differ(norm):
    threat, origin = ThreatModel(norm=norm, eps=0.1), torch.full((2, 1, 5, 5), 0.5)
    first, second = threat.random_start(origin, KeyedNoise(torch.tensor([1, 2])))
    assert not torch.equal(first, second)


def test_linf_starts_are_uniform_in_the_ball():
    eps, origin = 0.1, torch.full((50, 1, 20, 20), 0.5)
    start = ThreatModel(eps=eps).random_start(origin, KeyedNoise(keys(0, 50)))
    scaled = ((start - origin) / eps).flatten().sort().values
    uniform = torch.linspace(-1.0, 1.0, len(scaled))
    assert float((scaled - uniform).abs().max()) < 2 * 1.95 / math.sqrt(len(scaled))


def test_l2_starts_have_uniform_radii():
    origin = torch.full((2000, 1, 4, 4), 0.5)
    threat = ThreatModel(norm="L2", eps=0.2)
    start = threat.random_start(origin, KeyedNoise(keys(0, 2000)))
    scaled = (threat.size(start, origin) / threat.eps).sort().values
    uniform = torch.linspace(0.0, 1.0, len(scaled))
    assert float((scaled - uniform).abs().max()) < 1.95 / math.sqrt(len(scaled))


@given(SHAPES, SEEDS, st.integers(-25, 8))
def test_the_steepest_l2_direction_has_unit_norm(shape, seed, exponent):
    # A confident classifier's gradients are as small as its softmax: e^-50 is no rarity.
    unscaled = 0.1 + torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    step = ThreatModel(norm="L2").direction(unscaled * 10.0**exponent)
    size = step.flatten(1).norm(dim=1)
    torch.testing.assert_close(size, torch.ones_like(size), rtol=1e-4, atol=1e-4)


@given(SHAPES, SEEDS)
def test_the_steepest_linf_direction_gains_the_l1_norm(shape, seed):
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    gain = (gradient * ThreatModel().direction(gradient)).flatten(1).sum(1)
    torch.testing.assert_close(gain, gradient.flatten(1).abs().sum(1))


@pytest.mark.parametrize("norm", NORMS)
def test_no_gradient_means_no_motion(norm):
    threat, x = ThreatModel(norm=norm), torch.full((2, 1, 3, 3), 0.5)
    assert torch.equal(threat.step(x, x, torch.zeros_like(x), 0.1), x)


@pytest.mark.parametrize("eps", [0.0, -1 / 255, float("nan"), float("inf")])
def test_an_impossible_eps_is_refused(eps):
    with pytest.raises(UsageError, match="eps"):
        ThreatModel(eps=eps)


def test_an_unknown_norm_is_refused_with_the_known_ones():
    with pytest.raises(UsageError, match="Linf, L2, L1"):
        ThreatModel(norm="L3")


@given(st.integers(1, 255))
def test_whole_255ths_print_exactly(k):
    assert fraction(k / 255) == f"{k}/255"


@pytest.mark.parametrize(("value", "text"), [(0.5, "0.5"), (0.031, "0.031"), (1e-4, "0.0001")])
def test_other_distances_print_as_decimals(value, text):
    assert fraction(value) == text


def test_a_threat_model_prints_its_norm_and_eps():
    assert str(ThreatModel(eps=8 / 255)) == "Linf 8/255"
    assert str(ThreatModel(norm="L2", eps=0.5)) == "L2 0.5"


# Every dtype, exactly.


@st.composite
def rounded_cases(draw) -> Case:
    """Originals and points in every precision, eps far below and above what it resolves."""
    case, dtype = draw(cases()), draw(st.sampled_from(FLOATS))
    return case._replace(origin=case.origin.to(dtype), x=case.x.to(dtype))


def exactly_within(threat: ThreatModel, x: Tensor, origin: Tensor) -> bool:
    far = NORMS[threat.norm].size(x.double() - origin.double())
    return bool((far <= threat.eps * (1.0 + 1e-11)).all()) and 0.0 <= float(
        x.min()
    ) <= 1.0 >= float(x.max())


@settings(max_examples=200)
@given(rounded_cases())
def test_a_projection_is_exact_in_the_images_own_dtype(case):
    found = case.threat.project(case.x, case.origin)
    assert found.dtype == case.origin.dtype
    assert exactly_within(case.threat, found, case.origin)
    assert torch.equal(case.threat.project(found, case.origin), found)


@settings(max_examples=100)
@given(rounded_cases())
def test_it_is_off_the_exact_one_by_no_more_than_a_rounding(case):
    found = case.threat.project(case.x, case.origin).double()
    exact = case.threat.project(case.x.double(), case.origin.double())
    spacing = torch.finfo(case.origin.dtype).eps
    assert bool(((found - exact).abs() <= spacing * exact.abs() + 1e-7).all())


@given(rounded_cases(), SEEDS)
def test_starts_and_steps_are_exact_too(case, seed):
    origin = case.origin
    start = case.threat.random_start(origin, KeyedNoise(keys(seed, len(origin))))
    gradient = torch.randn(origin.shape, generator=torch.Generator().manual_seed(seed))
    step = case.threat.step(start, origin, gradient.to(origin.dtype), case.threat.eps)
    for x in (start, step):
        assert x.dtype == origin.dtype
        assert bool(x.isfinite().all())
        assert exactly_within(case.threat, x, origin)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_random_starts_are_spread_alike_in_every_dtype(norm, dtype):
    origin = torch.full((64, 1, 8, 8), 0.5)
    threat = ThreatModel(norm=norm, eps={"Linf": 0.1, "L2": 0.8, "L1": 6.0}[norm])
    noise = KeyedNoise(keys(0, 64))
    delta = (threat.random_start(origin.to(dtype), noise).double() - 0.5).flatten()
    exact = (threat.random_start(origin.double(), noise) - 0.5).flatten()
    # The same draws, up to the rounding of images near 0.5.
    assert float((delta - exact).abs().max()) <= 0.5 * torch.finfo(dtype).eps + 1e-6


def test_gradients_go_through_the_projection_as_through_clipping():
    origin = torch.tensor([0.2, 0.5, 0.9]).view(1, 1, 1, 3)
    x = torch.tensor([0.21, 0.9, 0.93]).view(1, 1, 1, 3).requires_grad_()
    found = ThreatModel(eps=0.05).project(x, origin)
    assert torch.equal(found.detach(), ThreatModel(eps=0.05).project(x.detach(), origin))
    assert torch.autograd.grad(found.sum(), x)[0].flatten().tolist() == [1.0, 0.0, 1.0]


# The lattice of 8-bit images.


@settings(max_examples=100)
@given(cases(), st.integers(1, 8))
def test_a_projection_onto_the_lattice_lies_on_it_and_within_eps(case, bits):
    levels = 2**bits - 1
    origin = (case.origin * levels).round() / levels
    threat = ThreatModel(norm=case.threat.norm, eps=case.threat.eps, bits=bits)
    found = threat.project(case.x, origin)
    steps = found.double() * levels
    assert float((steps - steps.round()).abs().max()) < 1e-4
    apart = (steps.round() - (origin.double() * levels).round()) / levels
    assert bool((NORMS[threat.norm].size(apart) <= threat.eps * (1.0 + 1e-9)).all())
    assert torch.equal(threat.project(found, origin), found)


def test_all_of_eps_is_used_on_the_lattice_where_eps_is_a_step_of_it():
    origin = torch.arange(256).view(1, 1, 16, 16) / 255
    found = ThreatModel(eps="8/255", bits=8).project(origin + 1.0, origin)
    assert torch.equal(found, (torch.arange(256) + 8).clamp(max=255).view(1, 1, 16, 16) / 255)


def test_a_saved_picture_is_the_image_that_was_judged():
    origin = torch.randint(256, (2, 3, 5, 5), generator=torch.Generator().manual_seed(0)) / 255
    found = ThreatModel(norm="L2", eps=0.7, bits=8).project(origin + 0.1, origin)
    assert torch.equal((found * 255).round().byte() / 255, found)
    assert not torch.equal(found, origin)


def test_images_off_the_lattice_are_refused():
    threat = ThreatModel(eps=0.1, bits=8)
    threat.check(torch.arange(4).view(1, 1, 2, 2) / 255)
    with pytest.raises(UsageError, match="bits=8 the images must lie on that lattice"):
        threat.check(torch.full((1, 1, 2, 2), 0.5))


# An eps that means something else.


@pytest.mark.parametrize(
    ("norm", "eps", "said"),
    [("Linf", 8, "8/255"), ("Linf", 1.5, "1.5/255"), ("L2", 128, "128/255")],
)
def test_an_eps_beyond_the_box_is_refused_with_what_it_may_mean(norm, eps, said):
    with pytest.raises(UsageError, match=f"did you mean {said}"):
        ThreatModel(norm=norm, eps=eps).check(torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize(("norm", "eps"), [("Linf", 1.0), ("L2", 55.0), ("L1", 3000.0)])
def test_the_whole_box_may_be_allowed(norm, eps):
    ThreatModel(norm=norm, eps=eps).check(torch.zeros(1, 3, 32, 32))
