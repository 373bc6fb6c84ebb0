"""Where chains begin, how long they live, and what a generator makes of it."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ebm_defense.errors import UsageError
from ebm_defense.learning.draws import Batch, Draws, batch_of
from ebm_defense.learning.energies.recipe import EnergyRecipe
from ebm_defense.learning.energies.registry import Parts, make_objective, make_start
from ebm_defense.learning.energies.starts import (
    BurnIn,
    Cooperative,
    FromData,
    FromNoise,
    Persistent,
)
from ebm_defense.learning.parallel import Team

quick = settings(deadline=None, max_examples=30, derandomize=True)
CPU, ALONE = torch.device("cpu"), Team()


def numbered(count: int) -> torch.Tensor:
    """Images that are their own number all over."""
    return torch.arange(float(count)).view(-1, 1, 1, 1).expand(count, 1, 2, 2).clone()


def batch(update: int = 0, size: int = 4, images=None, team: Team = ALONE, seed: int = 0) -> Batch:
    draws = Draws(seed=seed, update=update, places=team.places(size), batch=size, device=CPU)
    return batch_of(numbered(10) if images is None else images, draws)


def bank_of(size: int, p: float, team: Team = ALONE, source=None) -> Persistent:
    source = source or FromData(100 + numbered(5), 0.0)
    bank = Persistent(source, size, p, batch(-1, size, team=team), team)
    bank.bank = team.share(numbered(size)).clone()
    return bank


def test_every_image_is_seen_once_an_epoch():
    seen = torch.cat([batch(u, 4).images[:, 0, 0, 0] for u in range(5)]).long().tolist()
    assert Counter(seen) == dict.fromkeys(range(10), 2)
    assert seen[:10] != seen[10:]


def test_a_batch_in_parts_has_the_whole_batch_s_draws():
    whole = batch(3, 6)
    parts = list(whole.parts(4))
    assert [len(p) for p in parts] == [2, 2, 2]
    for draw in (
        lambda b: b.images,
        lambda b: b.noisy(0.3),
        lambda b: b.draws.integers("x", 1000),
        lambda b: b.draws.noise("y").normal(5, b.images),
    ):
        torch.testing.assert_close(torch.cat([draw(p) for p in parts]), draw(whole))


def test_noise_starts_fill_the_box():
    x = FromNoise().draw(batch(size=2000))
    assert -1 <= float(x.min()) < -0.99
    assert 0.99 < float(x.max()) <= 1
    assert abs(float(x.mean())) < 5 / math.sqrt(3 * x.numel())


def test_data_starts_are_images_with_noise():
    x = FromData(numbered(3), 0.1).draw(batch(size=20_000))
    number = x.round()
    shares = number[:, 0, 0, 0].long().bincount() / 20_000
    # Uniform over three images, and residuals of standard deviation 0.1.
    assert float((shares - 1 / 3).abs().max()) < 5 * math.sqrt(2 / 9 / 20_000)
    assert abs(float((x - number).std()) / 0.1 - 1) < 5 / math.sqrt(2 * x.numel())


@quick
@given(size=st.integers(1, 12), share=st.floats(0, 1), p=st.floats(0, 1), update=st.integers(0, 99))
def test_chains_are_visited_without_replacement_and_kept_where_they_end(size, share, p, update):
    b = batch(update, max(1, int(share * size)))
    bank = bank_of(size, p)
    rows, states = bank.rows(b), bank.draw(b)
    assert len(rows.unique()) == len(b) == len(states)
    assert torch.equal(bank.bank, numbered(size))
    renewed = states[:, 0, 0, 0] >= 100
    assert torch.equal(states[~renewed], numbered(size)[rows[~renewed]])
    bank.keep(b, states + 1000)
    moved = (bank.bank != numbered(size)).flatten(1).any(1)
    assert sorted(moved.nonzero()[:, 0].tolist()) == sorted(rows.tolist())
    assert torch.equal(bank.bank[rows], states + 1000)


def test_every_chain_is_visited_equally_often():
    bank, visits = bank_of(10, 0.0), Counter()
    for update in range(2000):
        visits.update(bank.rows(batch(update, 2)).tolist())
    assert sorted(visits) == list(range(10))
    # Binomial(2000, 1/5): standard deviation 18.
    assert all(abs(n - 400) < 5 * 18 for n in visits.values())


def test_chains_are_renewed_at_the_stated_rate_and_live_k_over_p_steps():
    bank = bank_of(20_000, 0.05, source=FromData(-1 - numbered(1), 0.0))
    fresh = int((bank.draw(batch(size=20_000))[:, 0, 0, 0] < 0).sum())
    # Binomial(20,000, 0.05): standard deviation 31.
    assert abs(fresh - 1000) < 5 * 31
    assert bank.visits() == 20
    assert bank_of(4, 0.0).visits() == math.inf
    recipe = EnergyRecipe(batch=4, bank=8, rejuvenation=0.05)
    assert make_objective(parts(recipe)).lifetime() == pytest.approx(400)


def test_a_chain_is_renewed_after_its_last_visit_at_the_latest():
    """Ends count a chain's updates."""
    bank = Persistent(FromData(0 * numbered(1), 0.0), 8, 0.0, batch(-1, 8), ALONE, most=3)
    seen = Counter()
    for update in range(60):
        b = batch(update, 4)
        ends = bank.draw(b) + 1
        seen.update(ends[:, 0, 0, 0].long().tolist())
        bank.keep(b, ends)
    assert set(seen) == {1, 2, 3}
    assert bank.visits() == 3
    again = Persistent(bank.source, 8, 0.0, batch(-1, 8), ALONE, most=3)
    again.restore(bank.state())
    assert torch.equal(again.ages, bank.ages)
    half = Persistent(bank.source, 8, 0.5, batch(-1, 8), ALONE, most=2)
    assert half.visits() == 1.5


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_the_bank_and_do_together_what_one_does(world):
    whole = bank_of(13, 0.3)
    for update in range(20):
        one = batch(update, 8)
        whole.keep(one, whole.draw(one) + 0.5)
    shares = []
    for rank in range(world):
        team = Team(rank, world)
        mine = bank_of(13, 0.3, team)
        for update in range(20):
            b = batch(update, 8, team=team)
            mine.keep(b, mine.draw(b) + 0.5)
        shares.append(mine.bank)
    for rank, share in enumerate(shares):
        assert torch.equal(share, whole.bank[rank::world])


def test_a_bank_goes_on_in_a_team_of_another_size():
    state = bank_of(13, 0.3).state()
    mine = bank_of(13, 0.3, Team(1, 2))
    mine.bank.zero_()
    mine.restore(state)
    assert torch.equal(mine.bank, numbered(13)[1::2])
    with pytest.raises(ValueError, match="shape"):
        bank_of(12, 0.3).restore(state)


def test_chains_burn_in_before_learning_sees_them():
    """Ends count a chain's updates; the update bank only ever takes in what is old enough."""
    needed, first = 3, batch(-2, 4)
    source = FromData(torch.zeros(1, 1, 2, 2), 0.0)
    update = Persistent(source, 8, 0.0, batch(-1, 8), Team())
    burning = Persistent(source, 4, 0.0, first, Team())
    update.bank.fill_(-1e6)
    start = BurnIn(update, burning, needed, first)
    assert len(start.ages.unique()) > 1
    start.ages.zero_()
    for number in range(60):
        b = batch(number, 4)
        states = start.draw(b)
        assert len(states) == 8
        # Only the burn-in bank's half moves.
        start.keep(b, states + torch.cat([torch.zeros(4), torch.ones(4)]).view(-1, 1, 1, 1))
    fed = update.bank[update.bank > -1e5]
    assert len(fed) == update.bank.numel()
    assert bool((fed == needed).all())
    assert bool((burning.bank < needed).all())
    again = BurnIn(update, burning, needed, first)
    again.restore(start.state())
    assert torch.equal(again.ages, start.ages)
    assert start.visits() == 2 * needed


class Plain(nn.Module):
    """A generator of one constant image, which is easy to follow."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Parameter(torch.zeros(1, 2, 2))

    def forward(self, latents):
        return self.image + 0.0 * latents.sum(1).view(-1, 1, 1, 1)


def test_a_cooperative_generator_learns_where_its_chains_end():
    start = Cooperative(generator := Plain(), 3, 0.1, Team())
    for update in range(100):
        b = batch(update, 4)
        start.keep(b, torch.full_like(start.draw(b), 0.7))
    assert float((generator.image.detach() - 0.7).abs().max()) < 0.02
    other = Cooperative(Plain(), 3, 0.1, Team())
    other.restore(start.state())
    assert torch.equal(other.generator.image, generator.image)


def test_in_a_bank_a_generator_learns_from_the_chains_that_it_began():
    source = Cooperative(generator := Plain(), 3, 0.1, Team())
    bank = Persistent(source, 8, 0.0, batch(-1, 8), Team())
    bank.keep(batch(0, 4), torch.full((4, 1, 2, 2), 0.7))
    assert float(generator.image.detach().abs().max()) == 0.0
    bank.rejuvenation = 1.0
    bank.keep(batch(1, 4), torch.full((4, 1, 2, 2), 0.7))
    assert float(generator.image.detach().min()) > 0.0
    assert "optimiser" in bank.state()["source"]


def parts(recipe: EnergyRecipe, generator=None) -> Parts:
    return Parts(
        recipe=recipe,
        images=numbered(10),
        places=batch,
        precision="fp32",
        team=Team(),
        generator=generator,
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"start": "uniform"}, "chains start from noise, data"),
        ({"start": "generator"}, "need one"),
        ({"fresh": "cooperative"}, "need one"),
        ({"fresh": "persistent"}, "outside of banks"),
        ({"start": "burn-in", "burn_in": 2}, "burn_in must lie between"),
        ({"start": "burn-in", "fresh": "cooperative"}, "fresh = generator"),
    ],
)
def test_starts_that_do_not_fit_are_refused(options, said):
    recipe = EnergyRecipe(**({"batch": 4, "bank": 8, "burn_in": 4} | options))
    with pytest.raises(UsageError, match=said):
        make_start(recipe.start, parts(recipe))


def test_an_unknown_objective_is_refused():
    with pytest.raises(UsageError, match="objective is 'guess'; choose one of likelihood"):
        make_objective(parts(EnergyRecipe(objective="guess", batch=4, bank=8)))


def test_contrastive_divergence_starts_at_the_batch_s_own_images():
    b = batch(2, 4)
    start = make_start("batch", parts(EnergyRecipe(batch=4, bank=8, data_noise=0.1)))
    assert torch.equal(start.draw(b), b.noisy(0.1))
