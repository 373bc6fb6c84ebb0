"""DiffHammer's choice among replicates, against a case done by hand."""

import math

import pytest
import torch

from ebm_defense import PurifiedClassifier, UsageError
from ebm_defense.attacks import DiffHammer, Identity, Margin, ThreatModel
from ebm_defense.attacks.gradients.base import Purified
from ebm_defense.attacks.optimisers.diffhammer import Selective, agreement, each_loss, first_choice
from ebm_defense.noise import chain_keys
from ebm_defense.purifiers.baselines import GaussianNoise

THREAT = ThreatModel(eps=0.5)
# Three replicates of one image of two pixels: two agree, one is alone with a steeper slope.
SLOPES = torch.tensor([[2.0, 1.0], [1.0, 2.0], [-4.0, -3.0]]).double().view(3, 1, 1, 1, 2)
LOSSES = torch.tensor([[-1.0], [-0.5], [-3.0]]).double()


def elu(x):
    return x if x > 0 else math.exp(x) - 1


def test_the_replicate_is_chosen_along_whose_step_most_would_be_broken():
    # Steps are (1, 1), (1, 1) and (−1, −1); gains along the first 3, 3, −7, along the last the
    # opposite.
    first = elu(-1 + 1.5) + elu(-0.5 + 1.5) + elu(-3 - 3.5)
    last = elu(-1 - 1.5) + elu(-0.5 - 1.5) + elu(-3 + 3.5)
    assert first > last
    assert first_choice(LOSSES, SLOPES, THREAT).tolist() == [0]
    # Where the agreeing two are hopeless, the third is worth more.
    assert first_choice(LOSSES - torch.tensor([[6.0], [6.0], [0.0]]), SLOPES, THREAT).tolist() == [
        2
    ]


@pytest.mark.parametrize("eps", [0.05, 0.3])
@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_each_image_chooses_among_its_own_replicates(norm, eps):
    generator = torch.Generator().manual_seed(6)
    slopes = torch.randn((5, 40, 1, 2, 2), generator=generator).double()
    losses = torch.randn((5, 40), generator=generator).double()
    threat, chosen = ThreatModel(norm=norm, eps=eps), []
    for image in range(40):
        promise, own_losses = [], losses[:, image].tolist()
        for own in slopes[:, image]:
            step = eps * (own.sign() if norm == "Linf" else own / own.norm())
            gains = [float((step * other).sum()) for other in slopes[:, image]]
            promise.append(sum(elu(a + b) for a, b in zip(own_losses, gains, strict=True)))
        chosen.append(promise.index(max(promise)))
    assert first_choice(losses, slopes, threat).tolist() == chosen


def by_hand(losses, slopes, begun, sharpness, norm):
    """Five rounds of r ← Σ q g/Σ q with q = σ(λ(L + d(r)·g)), in plain Python."""
    r = slopes[begun]
    for _ in range(5):
        size = math.hypot(*r)
        d = [math.copysign(1.0, v) if norm == "Linf" else v / size for v in r]
        q = [
            1 / (1 + math.exp(-sharpness * (loss + d[0] * g[0] + d[1] * g[1])))
            for loss, g in zip(losses, slopes, strict=True)
        ]
        r = [sum(w * g[k] for w, g in zip(q, slopes, strict=True)) / sum(q) for k in range(2)]
    return r


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("begun", [0, 1, 2])
@pytest.mark.parametrize("sharpness", [0.3, 5.0])
def test_the_agreed_slope_is_the_one_done_by_hand(begun, sharpness, norm):
    threat = ThreatModel(norm=norm, eps=0.5)
    found = agreement(LOSSES, SLOPES, torch.tensor([begun]), threat, sharpness)
    losses, slopes = LOSSES.flatten().tolist(), SLOPES.view(3, 2).tolist()
    expected = by_hand(losses, slopes, begun, sharpness, norm)
    torch.testing.assert_close(found.flatten(), torch.tensor(expected).double())


def test_hopeless_replicates_still_agree_on_a_finite_slope():
    found = agreement(LOSSES - 1e4, SLOPES, torch.tensor([0]), THREAT, 5.0)
    assert bool(found.isfinite().all())
    assert float(found.abs().sum()) > 0.0


def test_the_loss_of_each_replicate_is_its_own():
    logits = torch.randn((4, 3, 5), generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 3, 1])
    expected = torch.stack([Margin()(z[None], labels) for z in logits])
    torch.testing.assert_close(each_loss(Margin(), logits, labels), expected)


class Recorder(Identity):
    """Doubles every way back, and remembers whose chains went back."""

    calls: list = []  # noqa: RUF012

    def purify(self, defense, images, keys):
        self.calls.append(keys)
        return Purified(defense.purify_replicates(images, keys), lambda cotangent: 2.0 * cotangent)


@pytest.fixture
def defense(two_class):
    weight = torch.randn((1, 4, 4), generator=torch.Generator().manual_seed(2)).double()

    class Curved(torch.nn.Module):
        def forward(self, x):
            margin = (weight * (x - 0.3) ** 2).flatten(1).sum(1)
            return torch.stack([-margin, margin], dim=1)

    return PurifiedClassifier(Curved(), GaussianNoise(0.3))


def test_the_agreed_slope_goes_back_through_the_chosen_chain_alone(defense):
    images = torch.rand((3, 1, 4, 4), generator=torch.Generator().manual_seed(1)).double()
    labels, keys = torch.tensor([0, 1, 0]), chain_keys(0, "test", range(3), range(5))
    Recorder.calls.clear()
    selective = Selective(gradient=Recorder(), threat=THREAT, sharpness=5.0)
    look = selective(defense, images, labels, keys, Margin())
    purified = defense.purify_replicates(images, keys).requires_grad_()
    losses = each_loss(Margin(), defense.classify_replicates(purified), labels)
    (slopes,) = torch.autograd.grad(losses.sum(), purified)
    begun = first_choice(losses.detach(), slopes, THREAT)
    (pulled,) = Recorder.calls
    assert torch.equal(pulled, keys[begun, torch.arange(3)][None])
    expected = agreement(losses.detach(), slopes, begun, THREAT, 5.0)
    torch.testing.assert_close(look.gradient, 2.0 * expected)
    torch.testing.assert_close(look.logits, defense.replicate_logits(images, keys))


def test_gradients_are_mixed_with_earlier_ones_ever_more(two_class, listen):
    attack = DiffHammer(fading=0.5)
    from ebm_defense.attacks.session import QueryResult

    new, old = torch.full((1, 1, 1, 1), 1.0), torch.full((1, 1, 1, 1), 10.0)
    seen = QueryResult(torch.ones(1, dtype=torch.bool), torch.zeros(1), new, torch.zeros(1, 1, 2))
    for step in (1, 3, 8):
        mixed = attack._blend(seen, old, step).gradient
        fresh = (step + 1) ** -0.5
        assert float(mixed) == pytest.approx(fresh + 10.0 * (1.0 - fresh))


@pytest.mark.parametrize("wrong", [{"fading": -1.0}, {"sharpness": 0.0}])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(UsageError):
        DiffHammer(**wrong)
