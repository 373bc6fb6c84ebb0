"""Square's moves: squares in Linf, and in L2 and L1 the mass of two windows moved into one."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ebm_defense._torchvision import torchvision
from ebm_defense.attacks.norms import NORMS
from ebm_defense.attacks.optimisers.square_proposals import PROPOSALS, bump, window
from ebm_defense.noise import KeyedNoise

LIKE = torch.zeros(300, 3, 8, 10).double()
NOISE = KeyedNoise(torch.arange(300) * 7919)
MASSES = {"L2": (2, 2), "L1": (1, 4)}  # the norm's power, and the bumps' steepness


@pytest.mark.parametrize("norm", NORMS)
def test_every_norm_has_its_moves(norm):
    assert norm in PROPOSALS


@pytest.mark.parametrize("norm", MASSES)
def test_sides_are_odd_and_three_or_more_where_the_image_has_room(norm):
    found = [PROPOSALS[norm].side(size, 9, 12) for size in range(13)]
    assert found == [3, 3, 3, 3, 5, 5, 7, 7, 9, 9, 9, 9, 9]
    assert PROPOSALS[norm].side(5, 2, 50) == 2


def test_squares_are_as_wide_as_they_are_told_to_be_but_for_the_image():
    assert [PROPOSALS["Linf"].side(size, 3, 5) for size in range(6)] == [1, 1, 2, 3, 3, 3]


@pytest.mark.parametrize("side", [1, 3, 8])
def test_windows_come_to_lie_everywhere_alike(side):
    draws = torch.rand((4000, 2), generator=torch.Generator().manual_seed(0))
    _, _, rows, columns = window(LIKE.new_zeros(4000, 3, 8, 10), side, draws)
    for place, length in ((rows, 8), (columns, 10)):
        first = place.flatten(1)[:, 0]
        assert torch.equal(place.flatten(1), first[:, None] + torch.arange(side))
        counts = first.bincount().float()
        assert len(counts) == length - side + 1
        # Binomial counts, each within 4.5 standard deviations.
        expected = 4000 / len(counts)
        assert float((counts - expected).abs().max()) <= 4.5 * expected**0.5


def test_a_draw_that_was_rounded_up_to_one_stays_in_the_image():
    _, _, rows, columns = window(torch.zeros(1, 1, 8, 10), 3, torch.ones(1, 2))
    assert (int(rows.max()), int(columns.max())) == (7, 9)


def test_stripes_have_one_sign_a_channel_and_column():
    stripes = PROPOSALS["Linf"].first(LIKE, 0.25, NOISE)
    assert stripes.shape == LIKE.shape
    assert set(stripes.unique().tolist()) == {-0.25, 0.25}
    assert torch.equal(stripes, stripes[:, :, :1].expand_as(stripes))
    assert abs(float(stripes[:, :, 0].mean())) < 4 * 0.25 / 9000**0.5


@pytest.mark.parametrize("side", [1, 3, 8])
def test_squares_add_one_sign_a_channel_in_one_window(side):
    before = torch.rand(LIKE.shape, generator=torch.Generator().manual_seed(1)).double()
    changes = PROPOSALS["Linf"].change(before, side, 0.25, 6, NOISE) - before
    inside = windows_of(before, side, 2, 6)[0]
    for image in range(len(LIKE)):
        rows, columns = inside[image]
        square = changes[image, :, rows, columns]
        signs = square[:, :1, :1].sign()
        torch.testing.assert_close(square, 0.5 * signs.expand_as(square))
        torch.testing.assert_close(changes[image].abs().sum(), torch.tensor(1.5 * side**2).double())
    assert 0.4 < float((changes.sum((2, 3)) > 0).double().mean()) < 0.6


@pytest.mark.parametrize("norm", NORMS)
def test_other_queries_draw_other_changes(norm):
    move, delta = PROPOSALS[norm], 0.01 * torch.ones_like(LIKE)
    one, same, other = (move.change(delta, 3, 1.0, number, NOISE) for number in (5, 5, 6))
    assert torch.equal(one, same)
    assert float((one != other).flatten(1).any(1).double().mean()) > 0.9


@pytest.mark.parametrize("norm", NORMS)
def test_an_images_moves_depend_on_its_own_key_alone(norm):
    moves, order = PROPOSALS[norm], torch.randperm(300, generator=torch.Generator().manual_seed(2))
    shuffled = KeyedNoise(NOISE.keys[order])
    first = moves.first(LIKE, 0.3, NOISE)
    assert torch.equal(moves.first(LIKE, 0.3, shuffled), first[order])
    after = moves.change(first, 3, 0.3, 1, NOISE)
    assert torch.equal(moves.change(first[order], 3, 0.3, 1, shuffled), after[order])
    assert torch.equal(moves.change(first[:1], 3, 0.3, 1, KeyedNoise(NOISE.keys[:1])), after[:1])


def test_bumps_are_those_of_the_reference():
    torchvision("datasets")  # torchattacks imports it, and it does not load everywhere by itself
    import torchattacks

    reference = torchattacks.Square(torch.nn.Identity(), norm="L2")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for side in range(2, 12):
            found, ours = reference.eta(side).double(), bump(side, 2, 2)
            assert min(float((found - shape).abs().max()) for shape in (ours, ours.T)) < 1e-6


@pytest.mark.parametrize("norm", MASSES)
@pytest.mark.parametrize("side", [1, 2, 3, 6, 11])
def test_a_bump_is_nested_squares_in_two_halves(norm, side):
    power, steepness = MASSES[norm]
    found = bump(side, power, steepness)
    half = side // 2
    expected = torch.zeros(side, side).double()
    for first, height, sign in ((0, half, 1.0), (half, side - half, -1.0)):
        part = torch.zeros(height, side).double()
        for k in range(max(height, side) // 2 + 1):
            top, left = height // 2 - k, side // 2 - k
            covered = slice(max(top, 0), top + 2 * k + 1), slice(max(left, 0), left + 2 * k + 1)
            part[covered] += 1.0 / (k + 1) ** steepness
        if height:
            expected[first : first + height] = sign * part / part.norm(p=power)
    torch.testing.assert_close(found, expected / expected.norm(p=power))


def windows_of(delta, side, coordinates, number):
    """The windows of a change, as slices of each image, from the draws it makes."""
    count, channels, *lengths = delta.shape
    own = 5 if coordinates == 4 else 2
    draws = NOISE.uniform(number, delta.new_empty(count, own + channels, 1, 1)).flatten(1)
    return [
        [
            [
                slice(first := int(draws[image, 2 * k + axis] * (length - side + 1)), first + side)
                for axis, length in enumerate(lengths)
            ]
            for image in range(count)
        ]
        for k in range(coordinates // 2)
    ]


@pytest.mark.parametrize("side", [3, 5, 8])
@pytest.mark.parametrize("norm", MASSES)
def test_a_change_moves_the_mass_of_two_windows_as_published(norm, side):
    power, steepness = MASSES[norm]
    eps, channels = 2.0, 3
    generator = torch.Generator().manual_seed(3)
    delta = torch.randn(LIKE.shape, generator=generator).double()
    share = torch.rand((300, 1, 1, 1), generator=generator).double()
    delta *= eps * share / delta.flatten(1).norm(p=power, dim=1).view(-1, 1, 1, 1)
    found = PROPOSALS[norm].change(delta, side, eps, 4, NOISE)
    into, out = windows_of(delta, side, 4, 4)
    draws = NOISE.uniform(4, delta.new_empty(300, 8, 1, 1)).flatten(1)
    upright = bump(side, power, steepness)
    for i in range(300):
        eta = upright if draws[i, 4] < 0.5 else upright.T
        unused = eps**power - float((delta[i].abs() ** power).sum())
        for c in range(channels):
            expected, union = delta[i, c].clone(), torch.zeros(8, 10, dtype=torch.bool)
            for rows, columns in (into[i], out[i]):
                union[rows, columns] = True
            mass = float((delta[i, c][union].abs() ** power).sum())
            available = (mass + unused / channels) ** (1 / power)
            window = delta[i, c][tuple(into[i])]
            sign = -1.0 if draws[i, 5 + c] < 0.5 else 1.0
            shape = sign * eta + window / window.norm(p=power)
            expected[union] = 0.0
            expected[tuple(into[i])] = available * shape / shape.norm(p=power)
            if norm == "L1":
                expected[tuple(into[i])] *= channels
            torch.testing.assert_close(found[i, c], expected)


@pytest.mark.parametrize("norm", MASSES)
def test_a_norm_rounded_above_eps_leaves_nothing_over_and_no_nan(norm):
    delta = torch.zeros_like(LIKE)
    delta[:, 0, 0, 0] = 1.0 + 1e-6
    assert bool(PROPOSALS[norm].change(delta, 3, 1.0, 1, NOISE).isfinite().all())


# In smaller images the new bump may be just what the window held, with the other sign.
@given(st.integers(0, 2**31), st.integers(1, 3), st.integers(3, 9), st.integers(3, 9))
def test_an_l2_change_spends_all_of_eps_whatever_it_changes(seed, channels, height, width):
    generator = torch.Generator().manual_seed(seed)
    delta = torch.randn((4, channels, height, width), generator=generator).double()
    delta *= 0.5 / delta.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    noise, moves = KeyedNoise(torch.arange(4) + seed), PROPOSALS["L2"]
    for before in (moves.first(delta, 0.7, noise), delta, torch.zeros_like(delta)):
        after = moves.change(before, moves.side(4, height, width), 0.7, 1, noise)
        torch.testing.assert_close(after.flatten(1).norm(dim=1), torch.full((4,), 0.7).double())


@pytest.mark.parametrize("norm", MASSES)
@pytest.mark.parametrize(("height", "width"), [(28, 28), (32, 32), (11, 8), (3, 4)])
def test_a_first_perturbation_is_a_grid_of_bumps(norm, height, width):
    power, steepness = MASSES[norm]
    like = torch.zeros(40, 2, height, width).double()
    found = PROPOSALS[norm].first(like, 1.5, KeyedNoise(torch.arange(40)))
    side = max(min(height, width) // 5, 1)
    tile = bump(side, power, steepness)
    down, across = height // side, width // side
    if norm == "L2":
        tile = tile * 1.5 / (2 * down * across) ** 0.5
    top, left = (height - down * side) // 2, (width - across * side) // 2
    seen = set()
    for row in range(down):
        for column in range(across):
            y, x = top + row * side, left + column * side
            part = found[:, :, y : y + side, x : x + side]
            for image in range(40):
                kinds = [kind_of(part[image, c], tile) for c in range(2)]
                assert len({lying for _, lying in kinds}) == 1
                seen |= set(kinds)
    assert len(seen) == (4 if side > 1 else 2)
    size = 1.5 if norm == "L2" else 2.0 * down * across
    torch.testing.assert_close(
        found.flatten(1).norm(p=power, dim=1), torch.full((40,), size).double()
    )


def kind_of(part, tile):
    """Which sign a bump has, and whether it lies."""
    for sign in (1.0, -1.0):
        for lying, shape in ((False, tile), (True, tile.T)):
            if torch.allclose(part, sign * shape):
                return sign, lying
    raise AssertionError("no bump")


def test_bumps_stand_and_lie_and_have_both_signs_alike_often():
    like = torch.zeros(400, 1, 10, 10).double()
    found = PROPOSALS["L1"].first(like, 1.0, KeyedNoise(torch.arange(400)))
    kinds = [kind_of(one[0, :2, :2], bump(2, 1, 4)) for one in found]
    for choice in zip(*kinds, strict=True):
        assert 0.4 < sum(value > 0 for value in choice) / 400 < 0.6
