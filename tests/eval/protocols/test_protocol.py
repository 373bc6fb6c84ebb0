"""Protocols are values: printed, saved, loaded, and never called more than they are."""

import dataclasses

import pytest
import torch
from torch import nn

import ebm_defense.attacks
from ebm_defense import PurifiedClassifier, Purifier, UsageError
from ebm_defense.attacks import PGD, CrossEntropy, ThreatModel, Transfer
from ebm_defense.attacks.norms import NORMS
from ebm_defense.eval import (
    PROTOCOLS,
    AsDeployed,
    OneStage,
    Protocol,
    Sequential,
    TwoStage,
    evaluate,
    get_protocol,
    load_protocol,
)
from ebm_defense.eval.judging.definitions import WORST

AVAILABLE = set(ebm_defense.attacks.__all__)
THREAT = ThreatModel(eps=0.1)


def needs(*names):
    missing = set(names) - AVAILABLE
    return pytest.mark.skipif(bool(missing), reason=f"no {', '.join(missing)}")


def protocols():
    yield get_protocol("quick")
    yield get_protocol("hill2021", norm="L2", eps=0.3, step_size=1 / 3)
    yield get_protocol("lifecycle2022", verdict="sequential", alpha=0.003)
    attack = PGD(threat=THREAT, steps=0, loss=CrossEntropy(average="softmax"), random_start=False)
    yield Protocol(
        name="mine",
        attacks=(Transfer(attack=attack, source="undefended"), attack),
        judge_replicates=7,
        verdict=OneStage(),
        ensemble=True,
        looks="last",
    )


@pytest.mark.parametrize("protocol", list(protocols()), ids=lambda p: p.name)
def test_a_saved_protocol_is_read_back_exactly(protocol, tmp_path):
    assert load_protocol(protocol.save(tmp_path / "a" / "protocol.toml")) == protocol


@needs("Full", "APGD", "Square")
@pytest.mark.parametrize("name", PROTOCOLS)
def test_every_preset_is_read_back_exactly(name, tmp_path):
    protocol = get_protocol(name)
    assert load_protocol(protocol.save(tmp_path / "protocol.toml")) == protocol


def test_a_protocol_prints_as_what_it_is_saved_as(tmp_path):
    protocol = get_protocol("quick")
    assert protocol.save(tmp_path / "p.toml").read_text(encoding="utf-8") == str(protocol)


def test_a_whole_number_may_stand_for_a_decimal(tmp_path):
    text = str(get_protocol("quick", eps=1.0)).replace("eps = 1.0", "eps = 1")
    (tmp_path / "p.toml").write_text(text, encoding="utf-8")
    eps = load_protocol(tmp_path / "p.toml").attacks[0].threat.eps
    assert (eps, type(eps)) == (1.0, float)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("steps = 10", "stepz = 10", r"attacks\[0\]\.stepz: unknown key"),
        ("judge_replicates", "judge_replicate", r"judge_replicate: unknown key"),
        ('kind = "PGD"', 'kind = "PDG"', r"attacks\[0\]: unknown kind 'PDG'"),
        ("steps = 10", 'steps = "ten"', r"attacks\[0\]\.steps: it must be of type int"),
        ("steps = 10", "steps = true", r"attacks\[0\]\.steps: it must be of type int"),
        ("steps = 10", "steps = -1", r"attacks\[0\]: an attack needs steps"),
        ('norm = "Linf"', 'norm = "L7"', r"attacks\[0\]\.threat: .*Linf, L2"),
        ('kind = "PGD"', "", r"unknown kind None"),
        ('looks = "selected"', 'looks = "some"', "selected, every, last"),
        ("candidates = 4", "candidates = 0", r"selection: a selection needs draws"),
        ("steps = 10", "steps =", "cannot be read"),
    ],
)
def test_what_does_not_fit_is_named_by_its_path(tmp_path, old, new, words):
    text = str(get_protocol("quick"))
    assert old in text
    (tmp_path / "p.toml").write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(UsageError, match=words):
        load_protocol(tmp_path / "p.toml")


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"nowhere\.toml"):
        load_protocol(tmp_path / "nowhere.toml")


# Presets.


def test_lifecycle2022_is_the_published_protocol():
    protocol = get_protocol("lifecycle2022")
    expected = PGD(
        threat=ThreatModel(norm="Linf", eps=8 / 255), steps=50, step_size=2 / 255, replicates=48
    )
    assert protocol.attacks == (expected,)
    assert (protocol.judge_replicates, protocol.verdict) == (128, TwoStage())


@needs("Full")
def test_mefa2026_is_the_published_protocol():
    protocol = get_protocol("mefa2026")
    (attack,) = protocol.attacks
    assert (attack.steps, attack.replicates, attack.step_size) == (100, 20, 2 / 255)
    assert (attack.random_start, type(attack.gradient).__name__) == (False, "Full")
    assert (protocol.looks, protocol.verdict, protocol.judge_replicates) == (
        "last",
        OneStage(),
        100,
    )


@needs("Full", "APGD", "TargetedAPGD", "DLR", "DiffHammer", "Square")
def test_standard_holds_every_kind_of_attack():
    protocol = get_protocol("standard")
    assert (protocol.name, protocol.ensemble, len(protocol.attacks)) == ("standard", True, 7)
    assert (protocol.verdict, protocol.looks) == (AsDeployed(), "selected")


@needs("Full", "APGD", "TargetedAPGD", "DLR", "DiffHammer", "Square")
def test_standard_without_a_member_is_called_partial():
    protocol = get_protocol("standard")
    for left_out in range(len(protocol.attacks)):
        attacks = tuple(a for i, a in enumerate(protocol.attacks) if i != left_out)
        assert dataclasses.replace(protocol, attacks=attacks).name == "standard-partial"
    assert dataclasses.replace(protocol, ensemble=False).name == "standard-partial"


@needs("Full", "APGD", "TargetedAPGD", "DLR", "DiffHammer", "Square")
@pytest.mark.parametrize("norm", NORMS)
def test_standard_is_whole_in_every_norm(norm):
    assert get_protocol("standard", norm=norm, eps=0.5).name == "standard"


def test_nothing_else_can_be_called_standard():
    attack = PGD(threat=THREAT)
    found = Protocol(name="standard", attacks=(attack,), judge_replicates=5, ensemble=True)
    assert found.name == "standard-partial"


@pytest.mark.parametrize(
    ("budget", "word"),
    [
        ({"verdict": "coin"}, "two-stage, one-stage, sequential"),
        ({"alpha": 0.1}, "no alpha"),
        ({"verdict": "one-stage", "alpha": 0.1}, "no alpha"),
        ({"verdict": "sequential", "alpha": 2.0}, "alpha"),
    ],
)
def test_an_impossible_verdict_is_refused(budget, word):
    with pytest.raises(UsageError, match=word):
        get_protocol("quick", **budget)


# What a run makes of them.


class Brightness(nn.Module):
    """Class 1 where the mean pixel is above one half."""

    def forward(self, x):
        margin = 10.0 * (x.flatten(1).mean(1) - 0.5)
        return torch.stack([-margin, margin], dim=1)


MEANS = (0.52, 0.57, 0.62, 0.8, 0.4)
IMAGES = torch.tensor(MEANS).view(-1, 1, 1, 1).expand(-1, 1, 4, 4).clone()
ONES = torch.ones(len(MEANS), dtype=torch.long)


def pgd(eps: float) -> PGD:
    return PGD(
        threat=ThreatModel(eps=eps), steps=4, step_size=eps, replicates=1, random_start=False
    )


def run(*attacks, **options):
    protocol = Protocol(name="mine", attacks=attacks, judge_replicates=3, **options)
    return evaluate(Brightness(), IMAGES, ONES, protocol)


PUBLISHED = {"verdict": TwoStage(), "looks": "every"}


@pytest.mark.parametrize("ensemble", [False, True])
def test_the_worst_of_all_is_judged_on_the_image_of_the_attack_that_found_it(ensemble):
    report = run(pgd(0.03), pgd(0.08), pgd(0.05), ensemble=ensemble)
    assert report.records["worst of all: attack"].tolist() == [0, 1, 1, 1, 0]
    assert report.records["worst of all: stands"].tolist() == [0, 0, 1, 1, 0]
    assert report.robust().value == 2 / 5
    assert [report.robust(i).right for i in range(3)] == [3, 2, 2 + (not ensemble)]
    assert report.table()["attack"].iloc[-1] == "worst of all"


def test_an_ensemble_spares_what_an_attack_before_surely_broke_and_keeps_its_image():
    report = run(pgd(0.03), pgd(0.08), ensemble=True)
    assert report.records["0 PGD-4: left"].tolist() == [1, 0, 0, 0, 1]
    assert report.records["1 PGD-4: chosen at"].tolist()[0] == -1
    first, second = (report.adversarial[f"{i} PGD-4"].flatten(1).mean(1) for i in range(2))
    assert first[0] == second[0] < 0.5
    assert first[1] > 0.5 > second[1]


def test_a_published_ensemble_takes_the_worst_of_all():
    attacks = (pgd(0.03), pgd(0.08), pgd(0.05))
    apart, together = run(*attacks, **PUBLISHED), run(*attacks, **PUBLISHED, ensemble=True)
    stands = [apart.records[f"{i} PGD-4: stands"] for i in range(3)]
    assert together.records["2 PGD-4: stands"].tolist() == [
        int(all(column)) for column in zip(*stands, strict=True)
    ]
    assert together.robust().value == 2 / 5
    table = together.table()
    assert table["attack"].iloc[-1] == "worst of all"
    assert table["attack"].iloc[-2].startswith("then PGD-4")
    assert table["accuracy"].tolist()[-4:] == [3 / 5, 2 / 5, 2 / 5, 2 / 5]


def test_later_attacks_of_a_published_ensemble_get_only_images_that_still_stand():
    records = run(pgd(0.03), pgd(0.08), ensemble=True, **PUBLISHED).records
    assert records["0 PGD-4: attack draws"].tolist() == [1, 1, 1, 1, 0]
    assert records["1 PGD-4: attack draws"].tolist() == [0, 1, 1, 1, 0]
    assert records["1 PGD-4: broken at"].tolist()[0] == 0


def test_a_published_ensemble_keeps_the_image_that_broke_the_defense():
    report = run(pgd(0.03), pgd(0.08), ensemble=True, **PUBLISHED)
    final = report.adversarial["1 PGD-4"].flatten(1).mean(1)
    broken = report.records["1 PGD-4: stands"] == 0
    assert (final[torch.tensor(broken.to_numpy())] < 0.5).all()
    assert final[0] == pytest.approx(0.49)
    # Definitions are drawn on those images, once.
    assert "0 PGD-4: draws" not in report.records
    majority = report.records["1 PGD-4: majority"]
    assert majority.tolist() == report.records["1 PGD-4: stands"].tolist()
    assert set(report.definitions()["images of"]) == {"clean", "worst of all"}


class Wandering(PGD):
    """Breaks the defense on its way, and ends where it began."""

    def run(self, defense, images, labels, *, ids, seed, judge=None):
        super().run(defense, images, labels, ids=ids, seed=seed, judge=judge)
        return images


@pytest.mark.parametrize(
    ("looks", "stands"),
    [("selected", [0, 1, 1, 1, 0]), ("every", [0, 1, 1, 1, 0]), ("last", [1, 1, 1, 1, 0])],
)
def test_a_protocol_may_judge_last_images_alone(looks, stands):
    attack = Wandering(**{f.name: getattr(pgd(0.03), f.name) for f in dataclasses.fields(PGD)})
    report = run(attack, looks=looks, verdict=OneStage())
    assert report.records["0 PGD-4: stands"].tolist() == stands


def test_last_images_are_judged_where_the_attack_ends():
    report = run(pgd(0.03), looks="last", verdict=OneStage())
    assert report.records["0 PGD-4: stands"].tolist() == [0, 1, 1, 1, 0]
    assert report.records["0 PGD-4: verified on"].tolist()[:4] == [3, 3, 3, 3]
    assert report.records["0 PGD-4: broken at"].tolist() == [4, -1, -1, -1, 0]


class Shaken(Purifier):
    """Moves a whole image up or down by normal noise."""

    def purify(self, images, noise):
        return images + 0.1 * noise.normal(0, images[:, :1, :1, :1])


def test_undecided_images_count_both_ways():
    harmless = PGD(threat=ThreatModel(eps=1e-6), steps=3, step_size=1e-6, replicates=3)
    protocol = Protocol(name="mine", attacks=(harmless,), judge_replicates=40, verdict=Sequential())
    images = torch.full((30, 1, 4, 4), 0.5)
    images[10:] = 0.9
    labels = torch.ones(30, dtype=torch.long)
    report = evaluate(PurifiedClassifier(Brightness(), Shaken()), images, labels, protocol)
    undecided = report.records["0 PGD-3: undecided"]
    assert undecided[:10].sum() >= 5
    assert not undecided[10:].any()
    found, stands = report.robust(), report.records["0 PGD-3: stands"]
    sure = dataclasses.replace(report, records=report.records.assign(**{
        "0 PGD-3: undecided": 0, "0 PGD-3: stands": stands.where(undecided == 0, 0)
    })).robust()  # fmt: skip
    assert found.low == pytest.approx(sure.low)
    assert found.high > sure.high
    assert "undecided images count both ways" in report.caption()


# The truth.


def test_a_perfect_classifier_with_random_errors_is_perfect_by_a_majority():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn((64, 10), generator=generator)

    def model(x):
        """Every class right but for 20% of the passes, in which the next class wins."""
        linear = x.flatten(1) @ weight
        # Sure of its class wherever it is, with the linear map's gradient.
        sure = nn.functional.one_hot(linear.argmax(1), 10)
        logits = 5.0 * sure + linear - linear.detach()
        wrong = torch.rand((len(x), 1), generator=generator) < 0.2
        return torch.where(wrong, logits.roll(1, 1), logits)

    images = torch.rand((100, 1, 8, 8), generator=generator)
    labels = (images.flatten(1) @ weight).argmax(1)
    harmless = PGD(threat=ThreatModel(eps=1e-6), steps=5, step_size=1e-6, replicates=4)
    report = evaluate(model, images, labels, attacks=[harmless])
    # Of a plain function one prediction is one pass.
    assert report.robust().low <= 0.8 <= report.robust().high
    # Over images that are all alike the bootstrap is narrow, and Wilson's interval conservative.
    by_images = dataclasses.replace(report, interval="bootstrap").definitions()
    rows = by_images.set_index(["images of", "definition"])
    for column in ("clean", "PGD-5 (BPDA+EOT)"):
        found = rows.loc[column]
        assert found.loc["mean logits of 150", "accuracy"] == 1.0
        assert found.loc["majority of 150", "accuracy"] == 1.0
        one = found.loc["one pass (mean)"]
        assert one["low"] <= 0.8 <= one["high"]
        worst = found.loc[f"worst of {WORST}"]
        assert worst["low"] <= 0.8**WORST <= worst["high"]
        assert worst["high"] - worst["low"] < 0.05
    assert {flag.name for flag in report.flags} == {"randomised output", "replay mismatch"}


def test_a_name_that_a_file_holds_is_the_classes_own_or_refused(tmp_path):
    text = str(get_protocol("hill2021"))
    assert 'name = "BPDA"' in text
    file = tmp_path / "p.toml"
    for old, new in (('name = "BPDA"\n', ""), ('name = "BPDA"', 'name = "BPDA"')):
        file.write_text(text.replace(old, new), encoding="utf-8")
        assert load_protocol(file) == get_protocol("hill2021")
    file.write_text(text.replace('name = "BPDA"', 'name = "full"'), encoding="utf-8")
    with pytest.raises(UsageError, match=r"gradient\.name: it is 'BPDA' and cannot be set"):
        load_protocol(file)
