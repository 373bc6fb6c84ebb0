"""Auto-PGD is the published algorithm where nothing is random, and no victim of luck elsewhere."""

import math

import pytest
import torch
from torch import nn

from ebm_defense import PurifiedClassifier, Purifier, UsageError
from ebm_defense.attacks import APGD, DLR, CrossEntropy, Margin, TargetedAPGD, ThreatModel
from ebm_defense.attacks.optimisers.apgd_rules import (
    RULES,
    begin,
    halve,
    refresh,
    reviews,
    sparse_step,
    thin,
    ticks,
    windows,
)
from ebm_defense.attacks.session import QueryResult
from ebm_defense.defense import as_defense

COUNT, CLASSES = 6, 5


def data(count=COUNT):
    generator = torch.Generator().manual_seed(1)
    images = torch.rand((count, 1, 6, 6), generator=generator, dtype=torch.float64)
    return images, torch.arange(count) % CLASSES


@pytest.fixture(scope="module")
def network():
    """A small classifier crooked enough for the ascent to halve its steps and turn back."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        layers = [nn.Flatten(), nn.Linear(36, 24), nn.Tanh(), nn.Linear(24, CLASSES)]
        net = nn.Sequential(*layers).double().requires_grad_(False)
        net[1].weight *= 8.0
        net[3].weight *= 4.0
        return net


def losses(network, x, label, loss):
    x = x.clone().requires_grad_()
    value = loss(network(x[None])[None], label[None])[0]
    (gradient,) = torch.autograd.grad(value, x)
    return float(value.detach()), gradient


def project(x, origin, threat):
    delta = x - origin
    if threat.norm == "Linf":
        return (origin + delta.clamp(-threat.eps, threat.eps)).clamp(0, 1)
    return (origin + delta * min(1.0, threat.eps / max(float(delta.norm()), 1e-12))).clamp(0, 1)


def ascend(x, gradient, size, threat):
    unit = gradient.sign() if threat.norm == "Linf" else gradient / gradient.norm()
    return x + size * unit


def reference_apgd(network, start, origin, label, threat, steps, loss):
    """Croce and Hein (2020), algorithm 1, on one image, written with scalars and a list."""
    checkpoints, width = [], max(int(0.22 * steps), 1)
    at, narrow, less = width, max(int(0.06 * steps), 1), max(int(0.03 * steps), 1)
    while at <= steps:
        checkpoints.append(at)
        width = max(width - less, narrow)
        at += width
    size, x, previous = 2 * threat.eps, start, start
    value, gradient = losses(network, x, label, loss)
    history, visited = [value], [x]
    best, best_value, best_gradient = x, value, gradient
    old_best, was_halved, last, halvings = value, True, 0, 0
    for k in range(1, steps + 1):
        a = 1.0 if k == 1 else 0.75
        z = project(ascend(x, gradient, size, threat), origin, threat)
        new = project(x + a * (z - x) + (1 - a) * (x - previous), origin, threat)
        previous, x = x, new
        value, gradient = losses(network, x, label, loss)
        history.append(value)
        visited.append(x)
        if value > best_value:
            best, best_value, best_gradient = x, value, gradient
        if k in checkpoints:
            rises = sum(history[i] > history[i - 1] for i in range(last + 1, k + 1))
            halve = rises <= 0.75 * (k - last)
            halve = halve or (not was_halved and best_value <= old_best)
            if halve:
                size, x, gradient, halvings = size / 2, best, best_gradient, halvings + 1
            was_halved, old_best, last = halve, best_value, k
    return torch.stack(visited), best, halvings


def reference_sparse_apgd(network, start, origin, label, threat, steps, loss):
    """Croce and Hein (2021), algorithm 1, on one image, written with scalars and lists."""
    size, x, moved, changed = threat.eps, start, -(-origin.numel() // 5), origin.numel()
    value, gradient = losses(network, x, label, loss)
    visited = [x]
    best, best_value, best_gradient, resets = x, value, gradient, 0
    every = max(int(0.04 * steps), 1)
    for k in range(1, steps + 1):
        steepest = gradient.abs().flatten().argsort(descending=True)[:moved]
        step = torch.zeros(origin.numel()).double()
        step[steepest] = size / moved * gradient.flatten()[steepest].sign()
        x = threat.project((x + step.view_as(x))[None], origin[None])[0]
        value, gradient = losses(network, x, label, loss)
        visited.append(x)
        if value > best_value:
            best, best_value, best_gradient = x, value, gradient
        if k % every == 0:
            now = int((best != origin).sum())
            if now < 0.95 * changed:
                size, x, gradient, resets = threat.eps, best, best_gradient, resets + 1
            else:
                size = max(size / 1.5, threat.eps / 10)
            moved, changed = max(math.ceil(now / 1.5), 1), now
    return torch.stack(visited), best, resets


@pytest.mark.parametrize("loss", [CrossEntropy(), DLR(), Margin()], ids=lambda loss: loss.name)
@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
@pytest.mark.parametrize("steps", [1, 7, 40])
def test_on_a_deterministic_model_it_is_the_published_algorithm_step_by_step(
    network, listen, norm, loss, steps
):
    threat = ThreatModel(norm=norm, eps={"Linf": 0.2, "L2": 1.0, "L1": 6.0}[norm])
    reference = reference_sparse_apgd if norm == "L1" else reference_apgd
    images, labels = data()
    heard = listen()
    attack = APGD(threat=threat, loss=loss, steps=steps)
    attack.run(as_defense(network), images, labels, ids=range(COUNT), seed=0, judge=heard)
    found = torch.stack([p.images for p in heard.proposals], dim=1)
    turned = 0
    for row in range(COUNT):
        arguments = found[row, 0], images[row], labels[row], threat, steps, loss
        visited, _, turns = reference(network, *arguments)
        torch.testing.assert_close(found[row], visited, rtol=0.0, atol=1e-9)
        turned += turns
    assert turned > 0 or steps == 1


def climbing(**changed):
    """An ascent of one pixel for each value given, on its way."""
    count = len(next(iter(changed.values())))
    look = QueryResult(*(torch.zeros(count, *shape) for shape in ((), (), (1, 1, 1), (1,))))
    climb = begin(torch.zeros(count, 1, 1, 1), look, 0.4)
    return climb._replace(**{name: torch.tensor(value) for name, value in changed.items()})


def test_a_step_is_halved_where_few_steps_rise_or_the_best_point_is_stuck():
    before = climbing(
        rises=[3.0, 4.0, 4.0, 4.0, 4.0],
        best_loss=[2.0, 2.0, 1.0, 1.0, 0.5],
        checked=[1.0, 1.0, 1.0, 1.0, 1.0],
        returned=[False, False, False, True, False],
    )
    after = halve(before, before.x, 0.2, 4)
    # Stuck, but just sent back: it gets a second window. A fresh look may also lower the best.
    assert after.returned.tolist() == [True, False, True, False, True]
    torch.testing.assert_close(after.size, torch.tensor([0.2, 0.4, 0.2, 0.4, 0.2]))
    assert after.checked.tolist() == before.best_loss.tolist()
    assert after.rises.tolist() == [0.0] * 5


def test_sparse_steps_follow_the_best_points_support():
    origin = torch.zeros(3, 1, 2, 4)
    best = torch.ones(3, 8).tril(-1) + torch.tensor([[0.0], [6.0], [0.0]])
    before = climbing(support=[8.0, 8.0, 2.0], size=[0.1, 0.6, 0.06])
    after = thin(before._replace(best=best.view_as(origin)), origin, 0.3, 1)
    assert after.support.tolist() == [0.0, 8.0, 2.0]
    # A best point that has changed nothing leaves one pixel to move.
    assert after.pixels.tolist() == [1.0, 6.0, 2.0]
    assert after.returned.tolist() == [True, False, False]
    torch.testing.assert_close(after.size, torch.tensor([0.3, 0.4, 0.04]))


def test_the_first_window_never_counts_as_stuck():
    assert climbing(rises=[4.0]).returned.tolist() == [True]


def test_a_fresh_look_at_the_best_point_replaces_what_luck_said_of_it():
    before = climbing(returned=[True, False], best_loss=[9.0, 9.0], checked=[9.0, 9.0])
    look = QueryResult(
        torch.ones(2).bool(), torch.tensor([1.0, 2.0]), torch.ones(2, 1, 1, 1), torch.zeros(1, 2, 1)
    )
    after = refresh(before, look)
    assert after.best_loss.tolist() == after.checked.tolist() == [1.0, 2.0]
    assert after.best_gradient.flatten().tolist() == [1.0, 1.0]
    # Only where the ascent goes on from there is it the iterate's own gradient.
    assert after.gradient.flatten().tolist() == [1.0, 0.0]


def test_sparse_checks_come_every_twenty_fifth_of_a_run():
    assert ticks(100) == dict.fromkeys(range(4, 100, 4), 4)
    assert ticks(30) == dict.fromkeys(range(1, 30), 1)
    assert ticks(1) == ticks(0) == {}


def test_checks_come_when_they_were_published_to_come():
    assert list(windows(100)) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert list(windows(100).values()) == [22, 19, 16, 13, 10, 7, 6, 6]
    assert list(windows(10)) == [2, 3, 4, 5, 6, 7, 8, 9]
    assert windows(1) == windows(0) == {}


def test_the_best_point_is_seen_afresh_now_and_then():
    assert reviews(windows(100), 10) == [22, 41, 57, 70, 80, 93]
    assert reviews(windows(100), 101) == []


@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
def test_it_attains_the_worst_case_of_a_linear_classifier(two_class, norm):
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn((1, 6, 6), generator=generator).double()
    linear = two_class(weight)
    images, labels = data()
    labels = labels % 2
    eps = {"Linf": 0.2, "L2": 0.8, "L1": 3.0}[norm]
    attack = APGD(threat=ThreatModel(norm=norm, eps=eps), loss=Margin(), steps=60)
    sign = 2.0 * labels - 1.0
    adversarial = attack(linear, images, labels)
    drop = sign * (linear.margin(images) - linear.margin(adversarial))
    worst = torch.stack(
        [greatest_drop(x, s * weight, norm, eps) for x, s in zip(images, sign, strict=True)]
    )
    # The sparse steps of L1 share a step among pixels, and so come near the corner, no further.
    torch.testing.assert_close(
        drop, worst, rtol={"Linf": 1e-9, "L2": 0.02, "L1": 0.01}[norm], atol=0.0
    )
    assert bool((drop <= worst + 1e-9).all())


def shortfall(linear, images, labels, eps):
    """What APGD in L1 leaves of the greatest drops of a linear classifier's margins, on average."""
    sign = 2.0 * labels - 1.0
    attack = APGD(threat=ThreatModel(norm="L1", eps=eps), loss=Margin(), steps=25)
    found = sign * (linear.margin(images) - linear.margin(attack(linear, images, labels)))
    worst = [
        greatest_drop(x, s * linear.weight, "L1", eps) for x, s in zip(images, sign, strict=True)
    ]
    return float((1.0 - found / torch.stack(worst)).mean())


@pytest.mark.parametrize("eps", [3.0, 8.0])
def test_in_l1_sparse_steps_leave_less_than_half_of_what_momentum_leaves(
    two_class, monkeypatch, eps
):
    generator = torch.Generator().manual_seed(4)
    linear = two_class(torch.randn((1, 6, 6), generator=generator).double())
    images, labels = data(20)
    sparse = shortfall(linear, images, labels % 2, eps)
    monkeypatch.setitem(RULES, "L1", RULES["L2"])
    assert sparse < 0.5 * shortfall(linear, images, labels % 2, eps)


def test_a_sparse_step_moves_the_steepest_pixels_alike_and_none_without_a_slope():
    gradient = torch.tensor([[0.0, -3.0, 2.0, 0.5, -1.0, 0.0], [0.0, 0.0, 4.0, 0.0, 0.0, 0.0]])
    step = sparse_step(
        gradient.view(2, 1, 2, 3), torch.tensor([0.6, 0.5]), torch.tensor([3.0, 4.0])
    )
    expected = torch.tensor([[0.0, -0.2, 0.2, 0.0, -0.2, 0.0], [0.0, 0.0, 0.5, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(step.flatten(1), expected)


def greatest_drop(x, slope, norm, eps):
    """How far w·x can fall in the ball and the box: exactly in Linf and L1, by bisection in L2."""
    room = torch.where(slope > 0, x, 1.0 - x).flatten()
    steep = slope.abs().flatten()
    if norm == "Linf":
        return (steep * room.clamp(max=eps)).sum()
    if norm == "L1":
        left, drop = eps, torch.zeros(()).double()
        for i in steep.argsort(descending=True).tolist():
            spent = min(left, float(room[i]))
            left, drop = left - spent, drop + spent * steep[i]
        return drop
    low, high = 0.0, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (low, middle) if (middle * steep).minimum(room).norm() > eps else (middle, high)
    return (steep * (low * steep).minimum(room)).sum()


class Lucky(Purifier):
    """Adds one number to every pixel: seldom a large one, most of the time none."""

    def purify(self, images, noise):
        lucky = noise.uniform(0, images[:, :1, :1, :1]) < 0.04
        return images + 2.0 * lucky


def mean_classifier():
    """Class 0 by mean brightness alone; an image loses by getting bright."""
    return (
        nn.Sequential(nn.Flatten(), nn.AvgPool1d(36), nn.Linear(1, 2, bias=False))
        .double()
        .requires_grad_(False)
    )


@pytest.fixture
def lucky():
    classifier = mean_classifier()
    classifier[2].weight.copy_(torch.tensor([[-1.0], [1.0]]))
    return PurifiedClassifier(classifier, Lucky())


def test_a_lucky_look_does_not_stop_the_ascent_of_a_random_defense(lucky):
    images, labels = 0.3 * data(24)[0], torch.zeros(24, dtype=torch.long)
    reached = {}
    for review in (5, 1000):
        attack = APGD(
            threat=ThreatModel(eps=0.5), loss=Margin(), steps=30, replicates=1, review=review
        )
        heard = Trail()
        attack.run(lucky, images, labels, ids=range(24), seed=0, judge=heard)
        # How far apart the last iterate and the worst case are, on average over the images.
        reached[review] = float((heard.last - (images + 0.5)).abs().mean())
    assert reached[5] < 0.8 * reached[1000]


class Trail:
    """A lenient judge that remembers the last proposal."""

    def __call__(self, proposal):
        self.last = proposal.images
        return torch.ones(len(proposal.rows), dtype=torch.bool)


def test_a_targeted_run_goes_to_each_of_the_likeliest_wrong_classes_in_turn(network, listen):
    images, labels = data()
    steps, targets = 4, 3
    heard = listen()
    attack = TargetedAPGD(threat=ThreatModel(eps=0.05), steps=steps, targets=targets)
    attack.run(as_defense(network), images, labels, ids=range(COUNT), seed=0, judge=heard)
    assert len(heard.proposals) == 1 + targets * (steps + 1)
    assert torch.equal(heard.proposals[0].images, images)
    order = network(images).scatter(1, labels[:, None], -torch.inf).argsort(1, descending=True)
    for k in range(targets):
        first = 1 + k * (steps + 1)
        start, moved = heard.proposals[first].images, heard.proposals[first + 1].images
        for row in range(COUNT):
            x = start[row].clone().requires_grad_()
            logits = network(x[None])[0]
            ahead = logits[order[row, k]] - logits[labels[row]]
            ranked = logits.sort(descending=True).values
            ratio = ahead / (ranked[0] - (ranked[2] + ranked[3]) / 2)
            (gradient,) = torch.autograd.grad(ratio, x)
            z = start[row] + 0.1 * gradient.sign()
            z = torch.minimum(torch.maximum(z, images[row] - 0.05), images[row] + 0.05).clamp(0, 1)
            torch.testing.assert_close(moved[row], z)


def test_targets_stay_with_their_images_when_others_are_struck(network, listen):
    images, labels = data()
    attack = TargetedAPGD(threat=ThreatModel(eps=0.05), steps=3, targets=3)
    whole, struck = listen(), listen({0: [0], 2: [1, 4], 6: [3]})
    for heard in (whole, struck):
        attack.run(as_defense(network), images, labels, ids=range(COUNT), seed=0, judge=heard)
    assert struck.proposals[-1].rows.tolist() == [2, 5]
    for a, b in zip(whole.proposals, struck.proposals, strict=True):
        torch.testing.assert_close(a.images[b.rows], b.images)


def test_a_model_of_few_classes_has_few_targets(network, listen):
    images, labels = data()
    heard = listen()
    attack = TargetedAPGD(threat=ThreatModel(eps=0.05), steps=1)
    attack.run(as_defense(network), images, labels, ids=range(COUNT), seed=0, judge=heard)
    assert len(heard.proposals) == 1 + 2 * (CLASSES - 1) < attack.looks


def test_it_returns_a_wrong_image_even_if_a_right_one_has_the_higher_loss(network):
    # Cross-entropy of the mean logits need not rank points as their argmax does.
    images, _ = data(32)
    labels = network(images).argmax(1)
    attack = APGD(threat=ThreatModel(eps=0.01), steps=15, loss=CrossEntropy())
    wrong_somewhere = torch.zeros(32, dtype=torch.bool)

    def judge(proposal):
        wrong = proposal.logits.mean(0).argmax(-1) != labels[proposal.rows]
        wrong_somewhere[proposal.rows] |= wrong
        return torch.ones(len(wrong), dtype=torch.bool)

    last = attack.run(as_defense(network), images, labels, ids=range(32), seed=0, judge=judge)
    assert torch.equal(network(last).argmax(1) != labels, wrong_somewhere)
    assert 0 < int(wrong_somewhere.sum()) < 32


@pytest.mark.parametrize("wrong", [{"targets": 0}, {"restarts": 0}, {"review": 0}, {"steps": -1}])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(UsageError):
        TargetedAPGD(**wrong)


def test_cross_entropy_is_the_default_and_names_tell_losses_apart():
    assert APGD().name == "APGD-CE-100"
    assert APGD(loss=DLR(average="softmax"), restarts=2).name == "APGD-DLR(softmax)-100 ×2"
