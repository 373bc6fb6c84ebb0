"""What an attacker maximises."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from ebm_defense import UsageError
from ebm_defense.attacks import (
    APGD,
    DLR,
    LOSSES,
    PGD,
    CrossEntropy,
    Margin,
    Square,
    TargetedAPGD,
    TargetedDLR,
)
from ebm_defense.attacks.losses import LOSS_AVERAGES

AVERAGED = {
    "logits": lambda z: z.mean(0),
    "softmax": lambda z: z.softmax(-1).mean(0).log(),
    "log_softmax": lambda z: z.log_softmax(-1).mean(0),
}


def logits_of(classes=5, replicates=3, count=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 3.0 * torch.randn((replicates, count, classes), generator=generator).double()


def labels_of(count=6, classes=5):
    return torch.arange(count) % classes


def one_margin(z, y):
    return max(z[i] for i in range(len(z)) if i != y) - z[y]


def one_dlr(z, y):
    """The published ratio, class by class, on one row."""
    ranked = sorted(z.tolist(), reverse=True)
    return one_margin(z, y) / (ranked[0] - ranked[2] + 1e-12)


def one_targeted_dlr(z, y, t):
    ranked = sorted(z.tolist(), reverse=True)
    return -(z[y] - z[t]) / (ranked[0] - (ranked[2] + ranked[3]) / 2 + 1e-12)


def gradient_of(loss, logits, *classes):
    logits = logits.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(logits, *classes).sum(), logits)
    return gradient


@pytest.mark.parametrize("average", AVERAGED)
def test_the_cross_entropy_of_each_average_is_the_manual_one(average):
    logits, labels = logits_of(), labels_of()
    log_share = AVERAGED[average](logits)
    if average == "logits":
        log_share = log_share.log_softmax(-1)
    expected = -log_share[torch.arange(6), labels]
    torch.testing.assert_close(CrossEntropy(average=average)(logits, labels), expected)


def test_averaged_log_softmax_is_the_mean_of_the_replicates_losses():
    logits, labels = logits_of(), labels_of()
    each = torch.stack([F.cross_entropy(z, labels, reduction="none") for z in logits])
    for average in ("log_softmax", "replicates"):
        found = CrossEntropy(average=average)(logits, labels)
        torch.testing.assert_close(found, each.mean(0))


@pytest.mark.parametrize("average", AVERAGED)
def test_the_margin_of_each_average_is_the_manual_one(average):
    logits, labels = logits_of(), labels_of()
    averaged = AVERAGED[average](logits)
    expected = torch.stack([one_margin(z, int(y)) for z, y in zip(averaged, labels, strict=True)])
    torch.testing.assert_close(Margin(average=average)(logits, labels), expected)


@pytest.mark.parametrize("name", LOSSES)
def test_the_average_of_replicates_is_the_mean_of_every_replicates_loss(name):
    logits, classes = logits_of(), (labels_of(),)
    if LOSSES[name].targeted:
        classes += ((labels_of() + 2) % 5,)
    each = torch.stack([LOSSES[name]()(z[None], *classes) for z in logits])
    torch.testing.assert_close(LOSSES[name](average="replicates")(logits, *classes), each.mean(0))


def ranked_logits(rank, classes=6):
    """Logits in which class 2 has this rank, from 1, and the others some order."""
    values = [7.0, 5.5, 3.0, 2.5, 0.0, -4.0][:classes]
    others = [v for i, v in enumerate(values) if i != rank - 1]
    return torch.tensor([[[*others[1:3], values[rank - 1], others[0], *others[3:]]]]).double()


@pytest.mark.parametrize("rank", [1, 2])
def test_dlr_is_the_published_ratio_while_the_true_class_ranks_first_or_second(rank):
    logits, labels = ranked_logits(rank), torch.tensor([2])
    expected = one_dlr(logits[0, 0], 2)
    torch.testing.assert_close(DLR()(logits, labels)[0], expected)
    epsilon, numeric = 1e-6, torch.zeros(6).double()
    for i in range(6):
        shift = epsilon * F.one_hot(torch.tensor(i), 6)
        high, low = one_dlr(logits[0, 0] + shift, 2), one_dlr(logits[0, 0] - shift, 2)
        numeric[i] = (high - low) / (2 * epsilon)
    found = gradient_of(DLR(), logits, labels)[0, 0]
    torch.testing.assert_close(found, numeric, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("rank", [3, 4, 5, 6])
def test_dlr_climbs_as_the_margin_does_where_the_true_class_ranks_lower(rank):
    logits, labels = ranked_logits(rank), torch.tensor([2])
    found = gradient_of(DLR(), logits, labels)
    margin = gradient_of(Margin(), logits, labels)
    assert float(found.abs().max()) > 1e-3
    torch.testing.assert_close(found / found.norm(), margin / margin.norm())
    assert 1.0 < float(DLR()(logits, labels)) < 2.0


def test_the_published_ratio_has_no_gradient_where_the_true_class_ranks_third():
    # Why DLR is repaired: the plateau is real.
    assert one_dlr(ranked_logits(3)[0, 0], 2) == pytest.approx(1.0)
    assert one_dlr(ranked_logits(3)[0, 0] + torch.tensor([0, 0, 0.3, 0, 0, 0]), 2) == (
        pytest.approx(1.0)
    )


@given(st.lists(st.floats(-30, 30), min_size=3, max_size=7), st.integers(0, 2))
def test_dlr_never_loses_its_gradient_and_ranks_first_below_second_below_the_rest(row, label):
    logits, labels = torch.tensor([[row]], dtype=torch.float64), torch.tensor([label])
    ahead = int((logits[0, 0] > row[label]).sum())
    loss = float(DLR()(logits, labels))
    assert (loss <= 0.0, 0.0 <= loss <= 1.0 + 1e-9, 1.0 <= loss < 2.0)[min(ahead, 2)]
    assert float(gradient_of(DLR(), logits, labels).abs().sum()) > 0.0


@given(st.lists(st.floats(-30, 30), min_size=5, max_size=5), st.integers(1, 4))
def test_targeted_dlr_is_the_published_ratio(row, target):
    logits = torch.tensor([[row]], dtype=torch.float64)
    found = TargetedDLR()(logits, torch.tensor([0]), torch.tensor([target]))
    expected = one_targeted_dlr(logits[0, 0], 0, target)
    torch.testing.assert_close(found[0], expected)


@pytest.mark.parametrize("average", LOSS_AVERAGES)
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("value", [0.0, 80.0, -80.0])
def test_equal_logits_have_finite_losses_and_gradients(name, average, value):
    logits, classes = torch.full((3, 2, 5), value), (torch.tensor([0, 4]),)
    if LOSSES[name].targeted:
        classes += (torch.tensor([1, 2]),)
    loss = LOSSES[name](average=average)
    assert bool(loss(logits, *classes).isfinite().all())
    assert bool(gradient_of(loss, logits, *classes).isfinite().all())


@pytest.mark.parametrize("name", LOSSES)
def test_no_images_have_no_losses(name):
    labels = torch.zeros(0, dtype=torch.long)
    classes = (labels, labels) if LOSSES[name].targeted else (labels,)
    assert LOSSES[name]()(torch.zeros(3, 0, 5), *classes).shape == (0,)


@pytest.mark.parametrize("loss", LOSSES.values())
@pytest.mark.parametrize("average", ["votes", "median"])
def test_what_has_no_gradient_is_refused_as_a_loss(loss, average):
    with pytest.raises(UsageError, match=average):
        loss(average=average)


@pytest.mark.parametrize(("name", "classes"), [("dlr", 2), ("targeted-dlr", 3)])
def test_too_few_classes_are_refused(name, classes):
    labels = torch.tensor([0])
    targets = (torch.tensor([1]),) if LOSSES[name].targeted else ()
    with pytest.raises(UsageError, match=f"{classes + 1} classes"):
        LOSSES[name]()(torch.zeros(1, 1, classes), labels, *targets)


@pytest.mark.parametrize("attack", [PGD, APGD, Square])
def test_a_loss_that_needs_targets_is_refused_where_nobody_chooses_them(attack):
    with pytest.raises(UsageError, match="TargetedAPGD"):
        attack(loss=TargetedDLR())


def test_a_loss_without_targets_is_refused_where_they_are_chosen():
    with pytest.raises(UsageError, match="TargetedDLR"):
        TargetedAPGD(loss=DLR())
