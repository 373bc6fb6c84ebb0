"""Purifiers keep to [0, 1] images, draw from their own stream, and pass gradients straight."""

from __future__ import annotations

import io
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.ndimage import median_filter
from skimage.restoration import denoise_tv_chambolle

from ebm_defense.energies.conv import ConvEnergy, ConvEnergySettings
from ebm_defense.energies.quadratic import QuadraticEnergy
from ebm_defense.errors import UsageError
from ebm_defense.langevin import LangevinSettings, Trace, run_chain
from ebm_defense.noise import GeneratorNoise, KeyedNoise, chain_keys
from ebm_defense.purifiers.base import Purifier
from ebm_defense.purifiers.baselines import (
    BitDepth,
    GaussianNoise,
    Jpeg,
    MedianFilter,
    NoPurifier,
    TotalVariation,
)
from ebm_defense.purifiers.foreign import ForeignPurifier, as_purifier
from ebm_defense.purifiers.langevin import LangevinPurifier
from ebm_defense.purifiers.registry import baseline

quick = settings(deadline=None, max_examples=25, derandomize=True)
SPECS = ("none", "gaussian:0.25", "jpeg:75", "bits:3", "tv:0.1", "median:3")
SHAPES = ((2, 1, 8, 8), (3, 3, 16, 12))


def images_of(shape, seed=0, dtype=torch.float32) -> torch.Tensor:
    return torch.rand(shape, generator=seeded(seed), dtype=dtype)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def keyed(chains: int, seed: int = 0) -> KeyedNoise:
    return KeyedNoise(chain_keys(seed, "purify", range(chains), range(1))[0])


def langevin(steps=3, **options) -> LangevinPurifier:
    torch.manual_seed(0)
    energy = ConvEnergy(ConvEnergySettings(channels=1, image_size=8, width=2))
    return LangevinPurifier(energy, steps=steps, precision="fp32", **options)


def per_image(images, filtered):
    """Apply a function of `[H, W, C]` arrays to each image."""
    arrays = images.permute(0, 2, 3, 1).numpy()
    return torch.stack([torch.as_tensor(filtered(a)) for a in arrays]).permute(0, 3, 1, 2)


# Langevin


def test_langevin_takes_and_gives_images_in_zero_one():
    mean = torch.full((1, 8, 8), 0.6)  # in [-1, 1] units, so 0.8 of an image
    purifier = LangevinPurifier(
        QuadraticEnergy(mean, torch.full((64,), 1e-2)), steps=400, step_size=0.01, temperature=5e-5
    )
    ends = purifier(images_of((2, 1, 8, 8)), noise=keyed(2))
    assert abs(float(ends.mean()) - 0.8) < 0.05


def test_langevin_is_the_chain_between_two_changes_of_scale():
    purifier, images = langevin(step_size=0.1), images_of((2, 1, 8, 8))
    chain = LangevinSettings(steps=3, step_size=0.1)
    x = run_chain(
        2 * images - 1, keyed(2), energy=purifier.energy, settings=chain, precision="fp32"
    )
    torch.testing.assert_close(purifier(images, noise=keyed(2)), (x + 1) / 2, rtol=0, atol=1e-7)


def test_langevin_of_no_steps_returns_the_images():
    images = images_of((2, 1, 8, 8))
    torch.testing.assert_close(langevin(steps=0)(images), images, rtol=0, atol=1e-7)


def test_langevin_output_is_not_clamped():
    purifier = langevin(steps=20, step_size=0.5)
    ends = purifier(images_of((2, 1, 8, 8)), noise=keyed(2))
    assert float(ends.min()) < 0
    assert float(ends.max()) > 1


def test_langevin_keeps_a_trace_in_energy_units():
    trace, images = Trace(), images_of((2, 1, 8, 8))
    langevin().purify(images, keyed(2), trace=trace, snapshots=(0, 3))
    assert len(trace.energy) == 3
    torch.testing.assert_close(trace.snapshots[0], 2 * images - 1)


def test_langevin_knows_its_cost_and_precision():
    purifier = langevin(steps=7)
    assert purifier.chain_steps == 7
    assert NoPurifier().chain_steps == 0
    assert purifier.resolved_precision(torch.zeros(1)) == "fp32"
    assert purifier.resolved_precision(torch.zeros(1).double()) == "fp64"
    assert "steps=7" in repr(purifier)


def test_langevin_moves_with_its_module_and_works_on_functions():
    purifier = LangevinPurifier(lambda x: x.square().flatten(1).sum(1), steps=2)
    assert purifier(images_of((2, 3, 4, 4))).shape == (2, 3, 4, 4)
    assert langevin().double()(images_of((2, 1, 8, 8)).double()).dtype == torch.float64


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_langevin_purifies_where_gradients_are_switched_off(mode):
    purifier = langevin()
    expected = purifier(images_of((2, 1, 8, 8)), noise=keyed(2))
    with mode():
        purified = purifier(images_of((2, 1, 8, 8)), noise=keyed(2))
    assert torch.equal(purified, expected)


@pytest.mark.parametrize(
    "bad",
    [{"steps": -1}, {"step_size": 0}, {"temperature": -1}, {"precision": "fp8"}],
)
def test_langevin_refuses_bad_settings(bad):
    with pytest.raises(UsageError, match="steps" if "steps" in bad else next(iter(bad))):
        LangevinPurifier(lambda x: x.flatten(1).sum(1), **bad)


# What every purifier shares


def every_purifier():
    foreign = ForeignPurifier(lambda x: x + 0.1 * torch.randn_like(x))
    return [*map(baseline, SPECS), langevin(step_size=0.1), foreign]


@pytest.mark.parametrize("purifier", every_purifier(), ids=lambda p: type(p).__name__)
def test_gradient_is_exactly_the_identity(purifier):
    images = images_of((2, 1, 8, 8)).requires_grad_()
    upstream = torch.randn(images.shape, generator=seeded(1))
    (gradient,) = torch.autograd.grad(purifier(images), images, upstream)
    assert torch.equal(gradient, upstream)


@pytest.mark.parametrize("purifier", every_purifier(), ids=lambda p: type(p).__name__)
def test_shape_and_dtype_are_kept(purifier):
    images = images_of((3, 1, 8, 8))
    assert purifier(images).shape == images.shape
    assert purifier(images).dtype == images.dtype
    assert purifier(images[:0]).shape == (0, 1, 8, 8)


@pytest.mark.parametrize("purifier", every_purifier(), ids=lambda p: type(p).__name__)
def test_same_generator_seed_gives_the_same_images(purifier):
    images = images_of((2, 1, 8, 8))
    assert torch.equal(purifier(images, seeded(3)), purifier(images, seeded(3)))


@pytest.mark.parametrize("purifier", every_purifier(), ids=lambda p: type(p).__name__)
def test_only_stochastic_purifiers_differ_between_seeds(purifier):
    images = images_of((2, 1, 8, 8))
    same = torch.equal(purifier(images, seeded(3)), purifier(images, seeded(4)))
    assert same != purifier.stochastic
    assert torch.equal(purifier(images), purifier(images)) != purifier.stochastic


@pytest.mark.parametrize("purifier", every_purifier(), ids=lambda p: type(p).__name__)
def test_global_generator_is_neither_read_nor_moved(purifier):
    images = images_of((2, 1, 8, 8))
    torch.manual_seed(0)
    first, state = purifier(images, noise=keyed(2)), torch.get_rng_state()
    torch.manual_seed(1)
    second = purifier(images, noise=keyed(2))
    purifier(images)
    torch.manual_seed(0)
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("purifier", every_purifier(), ids=lambda p: type(p).__name__)
def test_the_callers_images_are_left_as_they_were(purifier):
    images = images_of((2, 1, 8, 8))
    before = images.clone()
    purifier(images)
    assert torch.equal(images, before)


@pytest.mark.parametrize("purifier", every_purifier(), ids=lambda p: type(p).__name__)
@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: (x * 255).byte(),
        lambda x: x * 255,
        lambda x: x * 2 - 1,
        lambda x: (x - 0.13) / 0.31,
        lambda x: x * float("nan"),
        lambda x: x[0],
    ],
    ids=["bytes", "0 to 255", "-1 to 1", "normalised", "NaN", "no batch"],
)
def test_images_on_another_scale_are_refused(purifier, wrong):
    images = torch.linspace(0, 1, 64).view(1, 1, 8, 8)
    purifier(images)
    with pytest.raises(UsageError, match="images"):
        purifier(wrong(images))


def test_a_generator_moves_on_between_calls():
    generator, images = seeded(0), images_of((2, 1, 8, 8))
    purifier = GaussianNoise(0.1)
    assert not torch.equal(purifier(images, generator), purifier(images, generator))


def test_a_purifier_of_ones_own_needs_only_purify():
    class Darken(Purifier):
        stochastic = False

        def purify(self, images, noise):
            return images / 2

    images = images_of((2, 3, 4, 4)).requires_grad_()
    purified = Darken()(images)
    assert torch.equal(purified, images.detach() / 2)
    assert torch.equal(torch.autograd.grad(purified.sum(), images)[0], torch.ones_like(images))


def test_the_base_purifier_does_nothing_by_itself():
    with pytest.raises(NotImplementedError):
        Purifier()(images_of((1, 1, 2, 2)))


# Baselines


@pytest.mark.parametrize("shape", SHAPES)
def test_none_is_the_identity(shape):
    assert torch.equal(baseline("none")(images_of(shape)), images_of(shape))


@pytest.mark.parametrize("shape", SHAPES)
def test_gaussian_adds_the_noise_times_std(shape):
    images, noise = images_of(shape), keyed(shape[0])
    expected = images + 0.25 * noise.normal(0, images)
    assert torch.equal(baseline("gaussian:0.25")(images, noise=noise), expected)


def test_gaussian_has_the_stated_std():
    flat = torch.full((1, 1, 200, 200), 0.5)
    noise = GaussianNoise(0.25)(flat, seeded(0)) - flat
    # The sample standard deviation of n normals has relative standard error 1 / sqrt(2n).
    assert abs(float(noise.std()) / 0.25 - 1) < 5 / math.sqrt(2 * 200 * 200)
    assert torch.equal(GaussianNoise(0.0)(flat), flat)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("quality", [10, 75, 95])
def test_jpeg_is_pillows(shape, quality):
    def through_a_file(image):
        mode = "L" if image.shape[-1] == 1 else "RGB"
        pixels = np.rint(image * 255).astype(np.uint8).squeeze()
        file = io.BytesIO()
        Image.fromarray(pixels).convert(mode).save(file, format="JPEG", quality=quality)
        file.seek(0)
        return np.asarray(Image.open(file)).reshape(image.shape).astype(np.float32) / 255

    images = images_of(shape)
    expected = per_image(images, through_a_file)
    torch.testing.assert_close(Jpeg(quality)(images), expected, rtol=0, atol=1e-6)


def test_jpeg_of_a_flat_image_is_nearly_flat_and_clips_what_lies_outside():
    images = torch.full((1, 3, 8, 8), 1.4)
    torch.testing.assert_close(Jpeg(90)(images), torch.ones(1, 3, 8, 8), rtol=0, atol=2 / 255)


@quick
@given(bits=st.integers(1, 8), pixel=st.floats(0, 1, width=32))
def test_bits_rounds_to_the_nearest_level(bits, pixel):
    found = float(BitDepth(bits)(torch.full((1, 1, 1, 1), pixel, dtype=torch.float64)))
    levels = np.linspace(0, 1, 2**bits)
    assert np.isclose(levels, found, rtol=0, atol=1e-12).any()
    assert abs(found - pixel) <= np.abs(levels - pixel).min() + 1e-12


@pytest.mark.parametrize("shape", SHAPES)
def test_bits_are_applied_twice_as_once(shape):
    once = baseline("bits:3")(images_of(shape))
    torch.testing.assert_close(baseline("bits:3")(once), once)
    assert len(once.unique()) == 8


@pytest.mark.parametrize("shape", SHAPES)
def test_total_variation_is_scikit_images(shape):
    images = images_of(shape)
    expected = per_image(
        images, lambda a: denoise_tv_chambolle(a, weight=0.1, channel_axis=-1)
    ).float()
    torch.testing.assert_close(TotalVariation(0.1)(images), expected)


def test_total_variation_lowers_the_total_variation():
    images = images_of((1, 1, 16, 16))
    rough, smooth = (
        float(x.diff(dim=2).abs().sum() + x.diff(dim=3).abs().sum())
        for x in (images, TotalVariation(0.2)(images))
    )
    assert smooth < 0.7 * rough


@pytest.mark.parametrize("shape", SHAPES)
def test_median_is_scipys_and_leaves_channels_apart(shape):
    images = images_of(shape)
    expected = torch.stack(
        [torch.stack([torch.from_numpy(median_filter(c.numpy(), 3)) for c in i]) for i in images]
    )
    assert torch.equal(MedianFilter(3)(images), expected)


def test_median_removes_a_single_speck():
    images = torch.zeros(1, 1, 7, 7)
    images[0, 0, 3, 3] = 1.0
    assert not MedianFilter(3)(images).any()
    assert torch.equal(MedianFilter(1)(images), images)


@pytest.mark.parametrize(
    ("spec", "kind"),
    [
        ("none", NoPurifier),
        ("gaussian:0.25", GaussianNoise),
        ("jpeg:75", Jpeg),
        ("bits:3", BitDepth),
        ("tv:0.1", TotalVariation),
        ("median:3", MedianFilter),
    ],
)
def test_specs_name_their_purifiers(spec, kind):
    assert type(baseline(spec)) is kind


@pytest.mark.parametrize("spec", ["gauss:1", "", "jpg:75", "none:3", "langevin:5"])
def test_unknown_names_are_answered_with_the_known_ones(spec):
    with pytest.raises(UsageError, match="choose none, gaussian:NUMBER, jpeg:NUMBER"):
        baseline(spec)


@pytest.mark.parametrize("spec", ["gaussian", "jpeg:", "bits:three", "median:3:3"])
def test_a_missing_number_is_asked_for(spec):
    with pytest.raises(UsageError, match="needs a number after the colon"):
        baseline(spec)


@pytest.mark.parametrize(
    "spec",
    [
        "gaussian:-1", "gaussian:nan", "jpeg:0", "jpeg:96", "jpeg:nan", "bits:0", "bits:9",
        "bits:2.5", "tv:0", "tv:-1", "tv:nan", "median:0", "median:2.5", "median:nan",
        "median:inf",
    ],
)  # fmt: skip
def test_numbers_out_of_range_are_refused(spec):
    with pytest.raises(UsageError):
        baseline(spec)


# Foreign purifiers


def test_as_purifier_wraps_only_what_is_foreign():
    ours = NoPurifier()
    assert as_purifier(ours) is ours
    assert isinstance(as_purifier(lambda x: x), ForeignPurifier)
    assert isinstance(as_purifier(torch.nn.Identity()), ForeignPurifier)


def test_a_foreign_module_is_registered_and_moves_along():
    purifier = as_purifier(torch.nn.Conv2d(1, 1, 3, padding=1)).double()
    assert len(list(purifier.parameters())) == 2
    assert purifier(images_of((2, 1, 8, 8)).double()).dtype == torch.float64


@pytest.mark.parametrize("make", [lambda s: keyed(2, s), lambda s: GeneratorNoise(seeded(s))])
def test_foreign_noise_follows_the_stream_given(make):
    purifier = ForeignPurifier(lambda x: x + torch.randn_like(x))
    images = images_of((2, 1, 8, 8))
    first = purifier(images, noise=make(0))
    assert torch.equal(purifier(images, noise=make(0)), first)
    assert not torch.equal(purifier(images, noise=make(1)), first)


def test_foreign_purifier_leaves_the_global_generator_alone_even_when_it_fails():
    def broken(x):
        torch.randn(5)
        raise RuntimeError("broken")

    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="broken"):
        ForeignPurifier(broken)(images_of((1, 1, 4, 4)))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_foreign_purifier_that_works_in_place_spares_the_callers_images():
    images = images_of((2, 1, 4, 4))
    before = images.clone()
    purified = ForeignPurifier(lambda x: x.mul_(0.5))(images)
    torch.testing.assert_close(purified, before / 2)
    assert torch.equal(images, before)


def test_a_foreign_purifier_builds_no_graph():
    weight = torch.ones(1, requires_grad=True)
    images = images_of((2, 1, 4, 4)).requires_grad_()
    ForeignPurifier(lambda x: x * weight)(images).sum().backward()
    assert weight.grad is None


def test_a_foreign_purifier_that_changes_the_shape_is_refused():
    with pytest.raises(UsageError, match="keep the images' shape"):
        ForeignPurifier(lambda x: x[:, :, :2])(images_of((2, 1, 4, 4)))


OFF_THE_SCALE = {
    "bytes": (lambda x: (255 * x).byte(), "not torch.uint8"),
    "up to 255": (lambda x: 255 * x, "divide 8-bit images by 255"),
    "from -1": (lambda x: 2 * x - 1, r"return \(y \+ 1\) / 2"),
    "from -1, noised": (lambda x: 2 * x - 1 + 0.1 * torch.randn_like(x), r"return \(y \+ 1\) / 2"),
    "complex": (lambda x: x + 0j, "not torch.complex64"),
    "not a number": (lambda x: x / 0, "NaN or infinite"),
}


@pytest.mark.parametrize("how", OFF_THE_SCALE)
def test_a_foreign_purifier_off_the_scale_is_refused(how):
    purify, said = OFF_THE_SCALE[how]
    images = torch.rand((4, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    with pytest.raises(UsageError, match=said):
        ForeignPurifier(purify)(images)


def test_a_foreign_purifier_of_much_noise_is_none_off_the_scale():
    images = torch.rand((4, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    found = ForeignPurifier(lambda x: x + 0.5 * torch.randn_like(x))(images)
    assert float(found.min()) < -0.5


@pytest.mark.parametrize("draw", [np.random.rand, random.random])
def test_noise_of_numpy_and_python_is_the_stream_s(draw):
    images = torch.rand((2, 1, 4, 4))
    purifier = ForeignPurifier(lambda x: x * draw())
    before = np.random.get_state()[1].copy(), random.getstate()
    one, same, other = (purifier(images, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    after = np.random.get_state()[1], random.getstate()
    assert (before[0] == after[0]).all()
    assert before[1] == after[1]
