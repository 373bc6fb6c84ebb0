"""What holds for every attack, from one table."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ebm_defense import PurifiedClassifier, Purifier, UsageError
from ebm_defense.attacks import (
    APGD,
    DLR,
    PGD,
    SPSA,
    DiffHammer,
    Identity,
    Margin,
    ScoreFree,
    Square,
    TargetedAPGD,
    ThreatModel,
)
from ebm_defense.attacks.base import lenient
from ebm_defense.attacks.norms import NORMS
from ebm_defense.defense import as_defense
from ebm_defense.eval import evaluate
from ebm_defense.purifiers.baselines import GaussianNoise

EPS = 0.05
CLASSES = 5
ATTACKS = {
    "PGD": PGD(steps=4, step_size=0.02, loss=DLR()),
    "momentum": PGD(steps=3, step_size=0.02, momentum=1.0, restarts=2, loss=Margin()),
    "score-free PGD": PGD(steps=3, step_size=0.02, gradient=ScoreFree(samples=3)),
    "APGD": APGD(steps=6, loss=DLR(average="replicates"), review=3),
    "score-free APGD": APGD(steps=3, gradient=ScoreFree(samples=3), restarts=2),
    "targeted APGD": TargetedAPGD(steps=3, targets=2, restarts=2, review=2),
    "DiffHammer": DiffHammer(steps=4, restarts=2),
    "Square": Square(steps=12, review=5),
    "SPSA": SPSA(steps=3, gradient=ScoreFree(samples=3)),
}
NAMES = list(ATTACKS)


def attack_of(name, norm="Linf", eps=EPS, **options):
    threat = ThreatModel(norm=norm, eps=eps)
    return dataclasses.replace(ATTACKS[name], threat=threat, replicates=3, **options)


def data(count=4, size=6, channels=1):
    generator = torch.Generator().manual_seed(1)
    images = torch.rand((count, channels, size, size), generator=generator, dtype=torch.float64)
    return images, torch.arange(count) % CLASSES


def network(size=6, channels=1):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Flatten(), nn.Linear(channels * size**2, 8), nn.Tanh(), nn.Linear(8, CLASSES)]
        return nn.Sequential(*layers).double().requires_grad_(False)


def noisy(size=6, channels=1):
    return PurifiedClassifier(network(size, channels), GaussianNoise(0.1), max_chains=7)


@st.composite
def cases(draw):
    name = draw(st.sampled_from(NAMES))
    norm = draw(st.sampled_from(list(NORMS)))
    eps = draw(st.sampled_from([1e-3, 0.03, 0.5, 1.0 if norm == "Linf" else 20.0]))
    shape = draw(st.sampled_from([(1, 1, 6), (2, 3, 4), (3, 1, 5), (1, 3, 1)]))
    return attack_of(name, norm, eps), *shape


FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@settings(max_examples=60)
@given(cases(), st.sampled_from(FLOATS))
def test_nothing_that_is_proposed_or_returned_leaves_the_threat_model(case, dtype):
    attack, count, channels, size = case
    images, labels = data(count, size, channels)
    images = (1.4 * images - 0.2).clamp(0.0, 1.0).to(dtype)
    proposed = []

    def judge(proposal):
        proposed.append((proposal.rows, proposal.images))
        return torch.ones(len(proposal.rows), dtype=torch.bool)

    defense = noisy(size, channels).to(dtype)
    last = attack.run(defense, images, labels, ids=range(count), seed=0, judge=judge)
    for rows, x in [*proposed, (torch.arange(count), last)]:
        assert x.dtype == dtype
        assert bool((attack.threat.size(x, images[rows]) <= attack.threat.eps + 1e-12).all())
        assert 0.0 <= float(x.min()) <= float(x.max()) <= 1.0


@pytest.mark.parametrize("name", NAMES)
def test_an_image_is_attacked_alike_alone_and_in_a_batch(name):
    images, labels = data()
    defense, attack = noisy(), attack_of(name)
    together = attack.run(defense, images, labels, ids=[4, 5, 6, 7], seed=0)
    alone = [
        attack.run(defense, images[i : i + 1], labels[i : i + 1], ids=[4 + i], seed=0)
        for i in range(4)
    ]
    torch.testing.assert_close(torch.cat(alone), together, rtol=0.0, atol=1e-9)
    assert float((together - images).abs().flatten(1).amax(1).min()) > 0.1 * EPS


@pytest.mark.parametrize("name", NAMES)
def test_an_image_is_attacked_alike_whichever_others_are_struck(name, listen):
    images, labels = data()
    defense, attack = noisy(), attack_of(name)
    whole, struck = listen(), listen({0: [0], 2: [3]})
    for heard in (whole, struck):
        attack.run(defense, images, labels, ids=range(4), seed=0, judge=heard)
    assert struck.proposals[-1].rows.tolist() == [1, 2]
    for a, b in zip(whole.proposals, struck.proposals, strict=True):
        torch.testing.assert_close(a.images[b.rows], b.images, rtol=0.0, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_a_struck_image_is_what_is_returned(name, listen):
    images, labels = data()
    heard = listen({1: [2]})
    last = attack_of(name).run(noisy(), images, labels, ids=range(4), seed=0, judge=heard)
    assert torch.equal(last[2], heard.proposals[1].images[2])


@pytest.mark.parametrize("name", NAMES)
def test_an_attack_ends_when_every_image_is_struck(name, listen):
    images, labels = data()
    heard = listen({2: [0, 1, 2, 3]})
    attack_of(name).run(noisy(), images, labels, ids=range(4), seed=0, judge=heard)
    assert len(heard.proposals) == 3


class Announced:
    """Counts what an attack really costs."""

    def __init__(self, counting_purifier):
        self.defense = PurifiedClassifier(network(), counting_purifier)
        self.purifier = counting_purifier

    @property
    def spent(self):
        return sum(self.purifier.rows) * self.purifier.chain_steps


@pytest.mark.parametrize("options", [{}, {"steps": 0}], ids=["all steps", "no steps"])
@pytest.mark.parametrize("stochastic", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_looks_and_cost_are_as_announced(name, counting_purifier, listen, stochastic, options):
    counting_purifier.stochastic = stochastic
    counted, heard, attack = Announced(counting_purifier), listen(), attack_of(name, **options)
    images, labels = data()
    assert counted.defense.check_deterministic(images) != stochastic
    counting_purifier.rows.clear()
    attack.run(counted.defense, images, labels, ids=range(4), seed=0, judge=heard)
    assert counted.spent == 4 * attack.chain_steps(counted.defense)
    assert counted.spent == sum(p.chain_steps for p in heard.proposals)
    assert not attack.open_ended
    steps = [p.step for p in heard.proposals]
    assert steps == list(range(len(steps)))
    assert len(steps) == attack.looks if stochastic else len(steps) <= attack.looks
    assert {len(p.logits) for p in heard.proposals} == {3 if stochastic else 1}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize("steps", [0, 1])
def test_short_attacks_on_few_images_run(name, count, steps):
    images, labels = data(count)
    attack = attack_of(name, steps=steps)
    assert attack(noisy(), images, labels).shape == images.shape
    assert attack(network(), images, labels).shape == images.shape


@pytest.mark.parametrize("name", NAMES)
def test_images_that_are_wrong_from_the_start_stay_wrong(name):
    images, _ = data()
    labels = network()(images).argmin(1)
    last = attack_of(name)(network(), images, labels)
    assert bool((network()(last).argmax(1) != labels).all())


@pytest.mark.parametrize("name", NAMES)
def test_a_plain_call_leaves_originals_and_the_global_generator_alone(name):
    images, labels = data()
    kept, before = images.clone(), torch.get_rng_state()
    with torch.no_grad():
        attack_of(name)(noisy(), images, labels)
    assert torch.equal(images, kept)
    assert torch.equal(torch.get_rng_state(), before)


class Faulty(Purifier):
    """Returns NaN for every third chain of dark images."""

    def purify(self, images, noise):
        dark = images.flatten(1).mean(1) < 0.3
        unlucky = noise.uniform(0, images[:, :1, :1, :1]).flatten() < 0.6
        return images + torch.where(dark & unlucky, torch.nan, 0.0).view(-1, 1, 1, 1)


@pytest.mark.parametrize("name", NAMES)
def test_replicates_of_nan_are_refused_with_their_images_names(name):
    images, labels = data()
    images[1:3] *= 0.2
    defense = PurifiedClassifier(network(), Faulty())
    with pytest.raises(UsageError, match=r"image 15, 16;"):
        attack_of(name).run(defense, images, labels, ids=[14, 15, 16, 17], seed=0)


class Cliff(nn.Module):
    """A classifier whose logits are numbers, and whose gradient on dark images is not."""

    def __init__(self):
        super().__init__()
        self.network = network()

    def forward(self, x):
        dark = (x.flatten(1).mean(1, keepdim=True) < 0.3).to(x)
        return self.network(x) + 0.0 * (1.0 - dark + 0.0 * x.flatten(1).sum(1, True)).sqrt()


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("name", ["PGD", "APGD", "targeted APGD", "DiffHammer"])
def test_a_gradient_of_nan_counts_as_zero_and_the_judge_hears_of_it(name, norm, caplog):
    images, labels = data()
    images[1:3] *= 0.3
    blind = torch.zeros(4, dtype=torch.int64)

    def judge(proposal):
        blind[proposal.rows] += proposal.blind
        return lenient(proposal)

    attack, ids = attack_of(name, norm), [14, 15, 16, 17]
    found = attack.run(as_defense(Cliff()), images, labels, ids=ids, seed=0, judge=judge)
    plain = attack.run(as_defense(network()), images, labels, ids=ids, seed=0)
    assert torch.equal(found[[0, 3]], plain[[0, 3]])  # no other image is touched by it
    assert found.isfinite().all()
    assert blind[[0, 3]].tolist() == [0, 0]
    assert (blind[1:3] > 0).all()
    (said,) = (r.getMessage() for r in caplog.records if "NaN" in r.getMessage())
    assert "gradient for image 15, 16 is NaN or infinite" in said


class Slips(Purifier):
    """Turns an image to its negative in one of five chains, whatever was done to it."""

    def purify(self, images, noise):
        slips = noise.uniform(0, images[:, :1, :1, :1]) < 0.2
        return torch.where(slips, 1.0 - images, images)


class Brightness(nn.Module):
    """Five classes, of which brightness decides between the first two."""

    def forward(self, x):
        shade = 8.0 * (x.flatten(1).mean(1, keepdim=True) - 0.5)
        return torch.cat([-shade, shade, torch.full_like(shade, -9.0).expand(-1, 3)], dim=1)


@pytest.mark.parametrize("name", NAMES)
def test_random_errors_alone_hardly_break_an_image(name):
    images, _ = data(count=10)
    labels = torch.arange(10) % 2
    images = 0.05 * images + 0.1 + 0.75 * labels.view(-1, 1, 1, 1)
    defense = PurifiedClassifier(Brightness(), Slips())
    attack = attack_of(name, eps=0.02)
    report = evaluate(defense, images, labels, attacks=[attack], judge_replicates=100)
    # Half or more of 16 replicates slip with a chance of 0.7%; of 60 predictions two may.
    assert report.robust().value > 0.96
    assert report.records["clean"].mean() > 0.96


def test_ways_back_that_fit_no_attack_are_refused():
    with pytest.raises(UsageError, match="ScoreFree"):
        SPSA(gradient=Identity())
    with pytest.raises(UsageError, match="VjpGradient"):
        DiffHammer(gradient=ScoreFree())


def test_a_norm_of_ones_own_climbs_as_l2_does_and_has_no_squares(monkeypatch):
    monkeypatch.setitem(NORMS, "round", NORMS["L2"])
    images, labels = data()
    own, known = (attack_of("APGD", norm)(noisy(), images, labels) for norm in ("round", "L2"))
    assert torch.equal(own, known)
    with pytest.raises(UsageError, match="Square has no moves in round, only in Linf, L2, L1"):
        attack_of("Square", "round")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("wrong", [{"steps": -1}, {"replicates": 0}])
def test_impossible_settings_are_refused(name, wrong):
    with pytest.raises(UsageError):
        dataclasses.replace(ATTACKS[name], **wrong)


@pytest.mark.parametrize("wrong", [{"momentum": 1.5}, {"momentum": -0.1}, {"restarts": 0}])
def test_impossible_momentum_and_restarts_are_refused(wrong):
    with pytest.raises(UsageError):
        PGD(**wrong)


def test_beside_a_defense_the_bare_classifier_is_attacked_without_a_way_back():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Costly(Identity):
        name: str = "costly"

    assert PGD(gradient=Costly()).direct.gradient == Identity()
    assert APGD(gradient=Costly()).direct.gradient == Identity()
    assert PGD(gradient=ScoreFree(samples=2)).direct.gradient == ScoreFree(samples=2)


def test_momentum_gathers_scaled_gradients(two_class, listen):
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn((1, 6, 6), generator=generator).double()

    class Curved(nn.Module):
        def forward(self, x):
            margin = (weight * (x - 0.5) ** 3).flatten(1).sum(1)
            return torch.stack([-margin, margin], dim=1)

    images, labels = data()
    labels, heard = labels % 2, listen()
    attack = PGD(steps=4, step_size=0.01, momentum=0.9, loss=Margin(), random_start=False)
    attack.run(as_defense(Curved()), images, labels, ids=range(4), seed=0, judge=heard)
    x, velocity = images, torch.zeros_like(images)
    for proposal in heard.proposals:
        torch.testing.assert_close(proposal.images, x)
        sign = (1.0 - 2.0 * labels).view(-1, 1, 1, 1)
        gradient = sign * weight * 3 * (x - 0.5) ** 2
        velocity = 0.9 * velocity + gradient / gradient.flatten(1).abs().sum(1).view(-1, 1, 1, 1)
        moved = x + 0.01 * velocity.sign()
        x = (images + (moved - images).clamp(-8 / 255, 8 / 255)).clamp(0.0, 1.0)


def test_the_best_of_the_restarts_is_returned(network_of_two_basins, listen):
    images = torch.full((20, 1, 2, 2), 0.5).double()
    labels = torch.zeros(20, dtype=torch.long)
    heard = listen()
    attack = PGD(threat=ThreatModel(eps=0.2), steps=3, step_size=0.05, restarts=4, loss=Margin())
    defense = as_defense(network_of_two_basins)
    last = attack.run(defense, images, labels, ids=range(20), seed=0, judge=heard)
    ends = torch.stack([p.images for p in heard.proposals if p.step % 4 == 3])
    losses = torch.stack([Margin()(network_of_two_basins(x)[None], labels) for x in ends])
    best = losses.argmax(0)
    assert set(best.tolist()) == {0, 1, 2, 3}
    assert torch.equal(last, ends[best, torch.arange(20)])


@pytest.fixture
def network_of_two_basins():
    """Two classes whose margin rises away from grey, in waves."""

    def margin(x):
        shade = (x - 0.5).flatten(1)
        waves = (30.0 * shade).sin() + 2.0 * shade.square()
        return torch.cat([-waves.sum(1, keepdim=True), waves.sum(1, keepdim=True)], dim=1)

    return margin
