"""Noise is a pure function of what it is for, and it is standard normal."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import stats

from ebm_defense.noise import (
    GeneratorNoise,
    KeyedNoise,
    _shift_xor,
    _splitmix,
    ahead,
    chain_keys,
    derive_seed,
    fresh_seed,
)

quick = settings(
    deadline=None,
    max_examples=25,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
seeds = st.integers(0, 2**63 - 1)


def noise_of(images, replicates=range(1), seed=0, purpose="test") -> KeyedNoise:
    return KeyedNoise(chain_keys(seed, purpose, images, replicates).flatten())


def like(rows: int, shape=(1, 2, 2), dtype=torch.float32) -> torch.Tensor:
    return torch.empty(rows, *shape, dtype=dtype)


def large_draw(dtype=torch.float32) -> torch.Tensor:
    return noise_of(range(400)).normal(0, like(400, (1, 50, 50), dtype)).flatten()


@quick
@given(seed=seeds, step=st.integers(0, 10_000), order=st.permutations(range(6)))
def test_same_key_gives_same_row_in_any_order(seed, step, order):
    straight = noise_of(range(6), seed=seed).normal(step, like(6))
    shuffled = noise_of(order, seed=seed).normal(step, like(6))
    assert torch.equal(shuffled, straight[list(order)])


@quick
@given(seed=seeds, first=st.integers(0, 5), last=st.integers(1, 6))
def test_chunk_gives_the_rows_of_the_whole(seed, first, last):
    rows = slice(min(first, last - 1), last)
    whole = noise_of(range(6), seed=seed)
    part = whole.chunk(rows)
    assert torch.equal(part.normal(3, like(len(part.keys))), whole.normal(3, like(6))[rows])
    assert torch.equal(part.uniform(3, like(len(part.keys))), whole.uniform(3, like(6))[rows])


def test_a_row_does_not_depend_on_who_shares_its_batch():
    alone = noise_of([7]).normal(4, like(1))
    crowded = noise_of([3, 900, 7]).normal(4, like(3))
    assert torch.equal(alone[0], crowded[2])


def test_draws_can_be_repeated_and_taken_in_any_order_of_steps():
    noise = noise_of(range(3))
    forward = [noise.normal(k, like(3)) for k in range(5)]
    backward = [noise.normal(k, like(3)) for k in reversed(range(5))]
    assert all(map(torch.equal, forward, reversed(backward)))


def test_replicates_come_in_rows_of_the_keys():
    keys = chain_keys(1, "test", [4, 8, 9], range(2, 7))
    assert keys.shape == (5, 3)
    assert keys.dtype == torch.int64
    assert keys[3, 1] == chain_keys(1, "test", [8], range(5, 6))


def test_keys_of_no_images_or_no_replicates_are_empty():
    assert chain_keys(0, "test", [], range(4)).shape == (4, 0)
    assert chain_keys(0, "test", [1, 2], range(0)).shape == (0, 2)


@quick
@given(st.lists(st.tuples(seeds, st.text(max_size=3), seeds, seeds), min_size=2, unique=True))
def test_every_part_of_a_key_counts(parts):
    keys = [int(chain_keys(s, p, [i], range(r, r + 1))) for s, p, i, r in parts]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize(
    "other",
    [
        {"step": 1},
        {"seed": 1},
        {"purpose": "other"},
        {"replicates": range(1, 2)},
        {"images": range(400, 800)},
    ],
)
def test_another_step_seed_purpose_replicate_or_image_is_uncorrelated(other):
    step = other.pop("step", 0)
    images = other.pop("images", range(400))
    a = large_draw().double()
    b = noise_of(images, **other).normal(step, like(400, (1, 50, 50))).flatten().double()
    # The product of two independent normals has mean 0 and variance 1: z = sum / sqrt(n).
    assert abs(float((a * b).sum())) / math.sqrt(len(a)) < 5
    assert abs(float((a**2 * b**2 - 1).sum())) / math.sqrt(8 * len(a)) < 5


def test_pixels_of_one_image_are_uncorrelated():
    x = noise_of(range(20_000)).normal(0, like(20_000, (1, 3, 3), torch.float64)).flatten(1)
    off_diagonal = (x.T @ x / math.sqrt(len(x))) * (1 - torch.eye(9))
    assert float(off_diagonal.abs().max()) < 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_moments_are_those_of_a_standard_normal(dtype):
    x = large_draw(dtype).double()
    n = len(x)
    # Standard errors of the k-th moment: sqrt((E[x^2k] - E[x^k]^2) / n), E[x^8] = 105.
    assert abs(float(x.mean())) < 5 / math.sqrt(n)
    assert abs(float((x**2).mean()) - 1) < 5 * math.sqrt(2 / n)
    assert abs(float((x**3).mean())) < 5 * math.sqrt(15 / n)
    assert abs(float((x**4).mean()) - 3) < 5 * math.sqrt(96 / n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_distribution_is_normal_by_kolmogorov_smirnov(dtype):
    assert stats.kstest(large_draw(dtype).numpy()[:200_000], "norm").pvalue > 1e-3


def test_the_tails_are_there():
    x = large_draw()
    expected = 2 * stats.norm.sf(4) * len(x)
    assert abs(int((x.abs() > 4).sum()) - expected) < 5 * math.sqrt(expected)


def test_float32_and_float64_draw_the_same_numbers():
    gap = (large_draw(torch.float32).double() - large_draw(torch.float64)).abs()
    # A uniform u near 1 rounds by 2^-25, which moves the radius sqrt(-2 log u) by up to 3.5e-4.
    assert float(gap.max()) < 5e-4
    assert float(gap.mean()) < 1e-6


def test_half_precision_draws_are_finite_and_close():
    full = noise_of(range(8)).normal(0, like(8, (3, 8, 8)))
    half = noise_of(range(8)).normal(0, like(8, (3, 8, 8), torch.bfloat16))
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), full, rtol=2**-8, atol=1e-3)


def test_the_extreme_words_give_finite_normals():
    from ebm_defense.noise import _box_muller

    words = torch.tensor([[0, -1, 2**63 - 1, -(2**63)]])
    for dtype in (torch.float32, torch.float64):
        assert bool(_box_muller(words, dtype).isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uniform_lies_in_zero_one_and_is_uniform(dtype):
    u = noise_of(range(100)).uniform(2, like(100, (1, 32, 32), dtype)).flatten()
    assert u.dtype == dtype
    assert 0 <= float(u.min()) < 1e-3
    assert 1 - 1e-3 < float(u.max()) < 1
    assert stats.kstest(u.numpy(), "uniform").pvalue > 1e-3


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 3, 3), (3, 5, 5), (1, 4, 4)])
def test_odd_and_even_pixel_counts_keep_the_shape(shape):
    x = noise_of(range(2)).normal(0, like(2, shape))
    assert x.shape == (2, *shape)
    assert x.flatten().unique().numel() == x.numel()


def test_no_rows_give_no_noise():
    assert noise_of([]).normal(0, like(0)).shape == (0, 1, 2, 2)
    assert noise_of([]).uniform(0, like(0)).shape == (0, 1, 2, 2)


def test_the_global_generator_is_untouched():
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    noise_of(range(4)).normal(0, like(4))
    noise_of(range(4)).uniform(0, like(4))
    GeneratorNoise(torch.Generator().manual_seed(0)).normal(0, like(4))
    fresh_seed()
    derive_seed(3, "test")
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)


def test_reseeding_the_global_generator_changes_nothing():
    torch.manual_seed(0)
    first = noise_of(range(2)).normal(0, like(2))
    torch.manual_seed(1)
    assert torch.equal(noise_of(range(2)).normal(0, like(2)), first)


def test_splitmix_matches_a_reference_in_plain_integers():
    def reference(z: int) -> int:
        mask = 2**64 - 1
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    values = [0, 1, -1, 2**63 - 1, -(2**63), 1234567890123456789, -987654321]
    drawn = _splitmix(torch.tensor(values))
    assert [v & (2**64 - 1) for v in drawn.tolist()] == [reference(v % 2**64) for v in values]


def test_shifts_are_logical_not_arithmetic():
    shifted = _shift_xor(torch.tensor([-(2**63)]), 60)
    assert int(shifted) == -(2**63) + 8


def test_generator_noise_repeats_from_the_same_seed():
    a, b = (GeneratorNoise(torch.Generator().manual_seed(5)) for _ in range(2))
    x = like(3, dtype=torch.float64)
    assert torch.equal(a.normal(0, x), b.normal(0, x))
    assert a.normal(1, x).dtype == torch.float64
    assert a.chunk(slice(0, 1)) is a


@quick
@given(seed=seeds)
def test_derived_seeds_are_valid_and_differ_by_purpose(seed):
    a, b = derive_seed(seed, "attack"), derive_seed(seed, "judge")
    assert a != b
    assert a == derive_seed(seed, "attack")
    torch.Generator().manual_seed(a)
    assert 0 <= a < 2**63


def test_fresh_seeds_differ():
    assert fresh_seed() != fresh_seed()


@pytest.mark.parametrize("shape", [(3, 1, 2, 2), (2, 1, 3, 3), (0, 1, 2, 2)])
def test_noise_of_many_steps_is_that_of_each(shape):
    noise, like = KeyedNoise(torch.arange(shape[0])), torch.zeros(shape)
    together = noise.normals(range(3, 8), like)
    each = torch.stack([noise.normal(step, like) for step in range(3, 8)])
    assert torch.equal(together, each)
    assert torch.equal(noise.normals(torch.arange(3, 8), like), each)


@pytest.mark.parametrize("size", [1, 5, 1 << 17])
def test_noise_drawn_ahead_is_that_of_each_step(size, monkeypatch):
    monkeypatch.setattr("ebm_defense.noise._AHEAD", size)
    noise, like = KeyedNoise(torch.arange(2)), torch.zeros(2, 1, 2, 2)
    drawn = list(ahead(noise, range(2, 9), like))
    assert torch.equal(torch.stack(drawn), noise.normals(range(2, 9), like))


def test_generator_noise_is_drawn_in_order():
    one, two = (GeneratorNoise(torch.Generator().manual_seed(0)) for _ in range(2))
    like = torch.zeros(2, 1, 2, 2)
    for z in ahead(one, range(3), like):
        assert torch.equal(z, two.normal(0, like))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_uniform_noise_of_every_dtype_is_the_same_noise_cast(dtype):
    noise = KeyedNoise(chain_keys(0, "test", range(64), range(1))[0])
    like = torch.zeros(64, 1, 16, 16)
    exact, found = noise.uniform(0, like.double()), noise.uniform(0, like.to(dtype))
    assert found.dtype == dtype
    assert 0.0 <= float(found.min()) <= float(found.max()) < 1.0
    assert float((found.double() - exact).abs().max()) <= torch.finfo(dtype).eps
