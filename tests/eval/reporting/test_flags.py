"""Known traps raise their flags, one small defense each; honest defenses raise none that is false.

What is told apart is seen by switching the trap off: the same defense without it is silent.
"""

from __future__ import annotations

import logging
import tomllib
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from ebm_defense import LangevinPurifier, PurifiedClassifier, Purifier
from ebm_defense.attacks import PGD, Full, Proposal, Smoothed, Surrogate, ThreatModel, Transfer
from ebm_defense.attacks.base import DirectCall, lenient
from ebm_defense.attacks.gradients.base import Identity, Purified, VjpGradient
from ebm_defense.defense import as_defense
from ebm_defense.energies.conv import ConvEnergy, ConvEnergySettings
from ebm_defense.eval import OneStage, Protocol, evaluate
from ebm_defense.eval.judging.sanity_checks import curvature, run_sanity_checks
from ebm_defense.eval.reporting.flags.attacks import compare_views
from ebm_defense.eval.reporting.flags.evidence import Evidence
from ebm_defense.eval.reporting.flags.registry import FLAGS

COUNT, SIZE, CLASSES = 32, 8, 10
THREAT = ThreatModel(eps=0.1)
STRONG = PGD(threat=THREAT, steps=10, step_size=0.05, replicates=4)


class Linear(nn.Module):
    """Ten classes by fixed random weights, with a gradient that may be tampered with."""

    def __init__(self, tamper=lambda x: x) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn((SIZE * SIZE, CLASSES), generator=generator)
        self.register_buffer("weight", weight - weight.mean(0))
        self.tamper = tamper

    def forward(self, x):
        return self.tamper(x).flatten(1) @ self.weight


class Reversed(torch.autograd.Function):
    """The identity, whose gradient points the wrong way."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


class Noisy(Purifier):
    def __init__(self, std: float = 0.01) -> None:
        super().__init__()
        self.std = std

    def purify(self, images, noise):
        return images + self.std * noise.normal(0, images)


@pytest.fixture
def images():
    return torch.rand((COUNT, 1, SIZE, SIZE), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def labels(images):
    return Linear()(images).argmax(1)


def raised(model, images, labels, *attacks, draws=16, **options):
    report = evaluate(model, images, labels, attacks=attacks, judge_replicates=draws, **options)
    assert {flag.name for flag in report.flags} <= set(FLAGS)
    return {flag.name: flag for flag in report.flags}


def test_an_honest_random_defense_raises_nothing_but_that_it_is_random(images, labels):
    found = raised(PurifiedClassifier(Linear(), Noisy()), images, labels, STRONG)
    assert set(found) == {"randomised output"}


def test_an_honest_deterministic_classifier_raises_nothing(images, labels):
    assert raised(Linear(), images, labels, STRONG) == {}


def test_zero_gradients_by_quantisation(images, labels):
    found = raised(Linear(lambda x: (x * 64).round() / 64), images, labels, STRONG)
    assert set(found) == {"no gradient", "unbounded attack fails"}
    assert "0 on 4" in found["no gradient"].evidence
    assert found["no gradient"].attacks == (0,)


class Renumbered(nn.Module):
    """A perfect classifier of 1,000 classes, of which the images' are these."""

    def __init__(self, outputs) -> None:
        super().__init__()
        self.inner, self.outputs = Linear(), outputs

    def forward(self, x):
        logits = x.new_full((len(x), 1000), -1e3)
        logits[:, self.outputs] = self.inner(x)[:, : len(self.outputs)]
        return logits


def test_labels_that_are_numbered_otherwise_than_outputs(images):
    """Four classes of 1,000: by their place in a list of four a perfect model is mostly wrong."""
    outputs = [0, 217, 482, 491]
    place = Linear()(images)[:, :4].argmax(1)
    weak = replace(STRONG, steps=1, replicates=1)
    wrong = raised(Renumbered(outputs), images, place, weak, draws=1)
    flag = wrong["other classes"]
    assert "tells 1,000 classes apart, the labels name 4 (up to 3)" in flag.evidence
    assert "--class-map" in flag.advice
    right = raised(Renumbered(outputs), images, torch.tensor(outputs)[place], weak, draws=1)
    assert "other classes" not in right


def test_gradients_that_are_no_numbers(images, labels):
    model = Linear(lambda x: x + 0.0 * (x - x).sqrt())
    report = evaluate(model, images, labels, attacks=[STRONG], judge_replicates=4)
    assert report.robust().total == COUNT  # the run comes to its end
    flags = [flag for flag in report.flags if flag.name == "no gradient"]
    assert [flag.attacks for flag in flags] == [(0,), (0,)]
    assert "infinite on 4" in flags[0].evidence
    assert "gradient of PGD-10 was NaN or infinite on 32 of 32 images" in flags[1].evidence


@pytest.mark.parametrize("looks", ["selected", "every", "last"])
def test_gradients_that_are_no_numbers_on_images_that_no_probe_saw(images, labels, looks):
    def tamper(x):
        cliff = (x.flatten(1).mean(1) > images.flatten(1).mean(1).quantile(0.9)).to(x)
        cliff[:4] = 0.0
        return x + 0.0 * (1.0 - cliff.view(-1, 1, 1, 1) + 0.0 * x).sqrt()

    protocol = Protocol(
        name="mine", attacks=(STRONG,), judge_replicates=4, verdict=OneStage(), looks=looks
    )
    report = evaluate(Linear(tamper), images, labels, protocol)
    (flag,) = (flag for flag in report.flags if flag.name == "no gradient")
    assert flag.attacks == (0,)
    assert "NaN or infinite on" in flag.evidence


def test_probabilities_for_logits(images, labels):
    found = raised(lambda x: Linear()(x).softmax(1), images, labels, STRONG)
    assert "probabilities" in found


class Detector(Purifier):
    """Mirrors images of which few copies run at a time, as they do for an attack."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def purify(self, images, noise):
        shaken = images + 0.01 * noise.normal(0, images)
        copies = int((images == images[:1]).flatten(1).all(1).sum())
        return shaken.flip(-1) if copies <= self.most else shaken


def test_a_defense_that_detects_the_attacks_replicate_count(images, labels):
    attack = replace(STRONG, replicates=2)
    defense = PurifiedClassifier(Linear(), Detector(2), max_chains=10_000)
    found = raised(defense, images, labels, attack, draws=32)
    assert "than the judge's on the same images" in found["views differ"].evidence
    honest = PurifiedClassifier(Linear(), Detector(0), max_chains=10_000)
    assert "views differ" not in raised(honest, images, labels, attack, draws=32)


class Aware(Purifier):
    """Answers otherwise where somebody takes a gradient."""

    stochastic = False

    def purify(self, images, noise):
        return images if torch.is_grad_enabled() else images.flip(-1)


def test_a_defense_that_answers_otherwise_when_a_gradient_is_taken(images, labels):
    @dataclass(frozen=True, kw_only=True)
    class Plain(VjpGradient):
        name: str = "plain"

        def purify(self, defense, images, keys):
            with torch.enable_grad():
                return Purified(defense.purify_replicates(images, keys), lambda g: g)

        def chain_steps(self, defense, replicates=1):
            return 0

    attack = replace(STRONG, gradient=Plain())
    defense = PurifiedClassifier(Linear(), Aware())
    assert "plain gradient" in raised(defense, images, labels, attack)["replay mismatch"].evidence


def test_a_model_that_draws_noise_of_its_own_cannot_be_replayed(images, labels):
    found = raised(lambda x: Linear()(x) + torch.randn((len(x), CLASSES)), images, labels, STRONG)
    assert {"randomised output", "replay mismatch"} <= set(found)


def chain(activation: str) -> PurifiedClassifier:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        energy = ConvEnergy(
            ConvEnergySettings(channels=1, image_size=SIZE, width=2, activation=activation)
        )
    return PurifiedClassifier(Linear(), LangevinPurifier(energy, 2, 0.01, 5e-5, "fp32"))


@pytest.mark.parametrize(
    ("activation", "gradient", "flagged"),
    [
        ("leaky_relu", Full(), True),
        ("soft_lrelu", Full(), False),
        ("leaky_relu", Identity(), False),
        ("leaky_relu", Surrogate(steps=1, through=Full()), True),
        ("leaky_relu", Surrogate(steps=1, through=Smoothed()), False),
    ],
)
def test_an_energy_without_curvature_under_the_full_gradient(
    images, labels, activation, gradient, flagged
):
    found = raised(chain(activation), images, labels, replace(STRONG, gradient=gradient))
    assert ("no curvature" in found) == flagged


@pytest.mark.parametrize(
    ("activation", "gradients", "flagged"),
    [
        ("soft_lrelu", [Identity()], (0,)),
        ("leaky_relu", [Identity(), Identity()], (0, 1)),
        ("soft_lrelu", [Identity(), Full()], None),
        ("leaky_relu", [Smoothed(), Identity()], None),
        ("leaky_relu", [Surrogate(steps=1, through=Smoothed())], None),
        ("soft_lrelu", [Surrogate(steps=1, through=Identity())], (0,)),
    ],
)
def test_a_chain_that_every_gradient_goes_around(images, labels, activation, gradients, flagged):
    attacks = [replace(STRONG, gradient=gradient) for gradient in gradients]
    found = raised(chain(activation), images, labels, *attacks)
    flag = found.get("around the chain")
    assert (flag and flag.attacks) == flagged


def test_curvature_is_measured_where_there_is_an_energy(images):
    assert curvature(chain("leaky_relu"), images, 0) == 0.0
    assert curvature(chain("soft_lrelu"), images, 0) > 0.0
    assert curvature(PurifiedClassifier(Linear(), Noisy()), images, 0) is None


class Rough(nn.Module):
    """Margins whose slopes turn over within the purifier's noise, in directions of their own."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.register_buffer("inner", 20 * torch.randn((SIZE * SIZE, 400), generator=generator))
        self.register_buffer("outer", torch.randn((400, CLASSES), generator=generator))

    def forward(self, x):
        return Linear()(x) + 0.05 * (x.flatten(1) @ self.inner).sin() @ self.outer


def test_too_few_replicates(images, labels):
    defense = PurifiedClassifier(Rough(), Noisy(0.1))
    few, many = (
        raised(defense, images, labels, replace(STRONG, steps=1, replicates=n)) for n in (1, 200)
    )
    assert "of 1 replicates" in few["weak signal"].evidence
    assert "weak signal" not in many


def test_an_attack_stopped_too_early(images, labels):
    slow = PGD(threat=THREAT, steps=5, step_size=0.01, replicates=1, random_start=False)
    found = raised(Linear(), images, labels, slow)
    assert "last fifth" in found["still falling"].evidence
    assert "still falling" not in raised(Linear(), images, labels, replace(slow, steps=40))


def test_an_attack_judged_once_at_its_end_has_no_curve(images, labels):
    slow = PGD(threat=THREAT, steps=5, step_size=0.01, replicates=1, random_start=False)
    protocol = Protocol(name="mine", attacks=(slow,), judge_replicates=4, looks="last")
    report = evaluate(Linear(), images, labels, protocol)
    assert report.robust().value < 0.9
    assert "still falling" not in {flag.name for flag in report.flags}


@pytest.mark.parametrize(
    ("late", "total", "flagged"), [(1, 8, False), (3, 40, False), (4, 40, True)]
)
def test_few_images_lost_late_are_no_sign(images, labels, late, total, flagged):
    protocol = Protocol(name="mine", attacks=(STRONG,), judge_replicates=1)
    broken = [10] * late + [-1] * (total - late)
    sanity_checks = run_sanity_checks(as_defense(Linear()), images, labels, (), 0)
    records = pd.DataFrame({"0 PGD-10: broken at": broken})
    evidence = Evidence(protocol=protocol, records=records, sanity_checks=sanity_checks)
    assert bool(list(FLAGS["still falling"][0](evidence))) == flagged


@dataclass(frozen=True, kw_only=True)
class Guess(DirectCall):
    """A black box attack that happens to know the way."""

    threat: ThreatModel = THREAT
    replicates: int = 1
    looks: int = 1
    name: str = "guess"
    source: nn.Module = field(default_factory=Linear)

    @property
    def direct(self):
        return self

    def chain_steps(self, defense):
        return 0

    def run(self, defense, images, labels, *, ids, seed, judge=lenient):
        x = STRONG(self.source, images, labels)
        keys = torch.zeros((1, len(x)), dtype=torch.int64)
        logits = defense.replicate_logits(x, keys).detach()
        judge(Proposal(0, torch.arange(len(x)), x, logits))
        return x


def test_a_black_box_attack_that_beats_the_white_box(images, labels):
    found = raised(Linear(Reversed.apply), images, labels, STRONG, Guess())
    assert set(found) == {"black box ahead", "unbounded attack fails"}
    assert found["black box ahead"].attacks == (1, 0)
    assert raised(Linear(), images, labels, STRONG, Guess()) == {}


def test_a_transfer_attack_that_beats_the_white_box(images, labels):
    masked = PurifiedClassifier(Linear(Reversed.apply), Noisy(), undefended=Linear())
    transfer = Transfer(attack=STRONG, replicates=4, source="undefended")
    found = raised(masked, images, labels, transfer, STRONG)
    assert set(found) == {"randomised output", "transfer ahead", "unbounded attack fails"}


def test_the_shipped_defense_raises_no_flag_that_is_false(shipped, sample):
    attack = PGD(threat=THREAT, steps=10, step_size=0.025, replicates=2)
    images, labels = sample.images[:16], sample.labels[:16]
    report = evaluate(shipped, images, labels, attacks=[attack], judge_replicates=16)
    honest = {"randomised output", "still falling", "around the chain"}
    assert {flag.name for flag in report.flags} <= honest


# Views of the same images.


def views(chances, draws, judged, shift=0.0, seed=0):
    generator = np.random.default_rng(seed)
    seen = generator.binomial(draws, np.clip(chances + shift, 0, 1))
    return (
        seen,
        np.full(len(chances), draws),
        generator.binomial(judged, chances),
        np.full(len(chances), judged),
    )


def test_two_honest_views_seldom_differ():
    chances = np.random.default_rng(1).random(60)
    found = [compare_views(*map(np.asarray, views(chances, 8, 32, seed=s)))[1] for s in range(400)]
    assert 0.02 * 400 < sum(p < 0.05 for p in found) < 0.08 * 400


def test_views_that_differ_are_told_apart():
    chances = np.random.default_rng(1).random(60)
    apart, p = compare_views(*views(chances, 8, 32, shift=-0.3))
    assert apart < -0.1
    assert p < 1e-6


def test_no_images_show_no_difference():
    nothing = np.zeros(0)
    assert compare_views(nothing, nothing, nothing, nothing) == (0.0, 1.0)


# Where flags are seen.


@pytest.fixture
def flagged(images, labels, tmp_path):
    quantised = Linear(lambda x: (x * 64).round() / 64)
    options = {"attacks": [STRONG], "judge_replicates": 4, "out": tmp_path / "run"}
    return evaluate(quantised, images, labels, **options)


@pytest.mark.parametrize("form", ["to_text", "to_markdown", "to_latex"])
def test_a_flag_is_a_mark_with_a_footnote(flagged, form):
    printed = getattr(flagged, form)()
    assert "PGD-10 (BPDA+EOT) [1, 2]" in printed
    assert f"[1] no gradient: {flagged.flags[0].evidence}. {flagged.flags[0].advice}" in printed


def test_flags_are_kept_in_the_run_folder(flagged, tmp_path):
    kept = tomllib.loads((tmp_path / "run" / "flags.toml").read_text(encoding="utf-8"))["flag"]
    assert [(f["name"], f["evidence"]) for f in kept] == [
        (f.name, f.evidence) for f in flagged.flags
    ]


def test_flags_are_logged(images, labels, caplog):
    with caplog.at_level(logging.WARNING, logger="ebm_defense.eval"):
        raised(lambda x: Linear()(x).softmax(1), images, labels, STRONG)
    assert any("probabilities" in r.getMessage() for r in caplog.records)


def test_flags_repeat(images, labels):
    defense = PurifiedClassifier(Rough(), Noisy(0.1))
    once, again = (
        raised(defense, images, labels, replace(STRONG, steps=1, replicates=1)) for _ in range(2)
    )
    assert once == again


def test_a_flag_of_the_model_marks_its_rows(images, labels):
    report = evaluate(
        PurifiedClassifier(Linear(), Noisy(), replicates=4),
        images,
        labels,
        attacks=[STRONG],
        judge_replicates=4,
    )
    assert report.to_text().count("defended [1]") == 2


# A purifier that destroys.


class Confidence(nn.Module):
    """Low where the classifier is sure or, with the other sign, where it is not."""

    def __init__(self, sign: float) -> None:
        super().__init__()
        self.inner, self.sign = Linear(), sign

    def forward(self, x):
        return -self.sign * self.inner((x + 1.0) / 2.0).logsumexp(1)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_an_energy_of_the_wrong_sign(images, labels, sign):
    purifier = LangevinPurifier(Confidence(sign), 60, 0.02, 0.004, "fp32")
    found = raised(PurifiedClassifier(Linear(), purifier), images, labels, STRONG)
    assert ("purifier destroys images" in found) == (sign < 0)
    if sign < 0:
        assert "other sign" in found["purifier destroys images"].advice
