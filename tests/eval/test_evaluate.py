"""An evaluation repeats, resumes, refuses what it cannot judge, and says what it did."""

import dataclasses
import importlib
import io
import tomllib
from itertools import pairwise

import pandas as pd
import pytest
import torch
from torch import nn

from ebm_defense import PurifiedClassifier, Purifier, UsageError
from ebm_defense.attacks import PGD, ThreatModel, Transfer
from ebm_defense.eval import Protocol, TwoStage, evaluate, get_protocol
from ebm_defense.eval.reporting import latex
from ebm_defense.storage.files import load_tensors

runner = importlib.import_module("ebm_defense.eval.running.runner")

THREAT = ThreatModel(eps=8 / 255)
ATTACK = PGD(threat=THREAT, steps=3, step_size=4 / 255, replicates=2)
ATTACKS = (Transfer(attack=ATTACK, replicates=2), ATTACK)
BUDGET = {"attacks": ATTACKS, "judge_replicates": 5}
COUNT = 10


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(3)
    return torch.rand((COUNT, 1, 8, 8), generator=generator, dtype=torch.float64)


@pytest.fixture
def labels(langevin_defense, images):
    """What the defense mostly says, and for every fifth image not."""
    labels = langevin_defense(replicates=50)(images).argmax(1)
    labels[::5] = (labels[::5] + 1) % 3
    return labels


def same(first: pd.DataFrame, second: pd.DataFrame, **tolerance) -> None:
    pd.testing.assert_frame_equal(first, second, **(tolerance or {"check_exact": True}))


# What the same command gives.


def test_the_same_command_gives_the_same_records(langevin_defense, images, labels):
    first, again = (evaluate(langevin_defense(), images, labels, **BUDGET) for _ in range(2))
    same(first.records, again.records)
    for name, found in first.adversarial.items():
        assert torch.equal(found, again.adversarial[name])
    assert first.settings == again.settings


def test_the_evaluation_finds_something_to_break_and_something_that_stands(
    langevin_defense, images, labels
):
    report = evaluate(langevin_defense(), images, labels, **BUDGET)
    assert 0.0 < report.robust().value < report.share("clean").value < 1.0


def test_another_seed_draws_other_noise(langevin_defense, images, labels):
    first, other = (
        evaluate(langevin_defense(), images, labels, seed=seed, **BUDGET) for seed in (0, 1)
    )
    assert not torch.equal(first.adversarial["1 PGD-3"], other.adversarial["1 PGD-3"])


def test_calls_before_an_evaluation_do_not_change_it(langevin_defense, images, labels):
    fresh, used = langevin_defense(), langevin_defense(seed=5)
    used(images)
    torch.manual_seed(8)
    same(
        evaluate(fresh, images, labels, **BUDGET).records,
        evaluate(used, images, labels, **BUDGET).records,
    )


def test_records_do_not_depend_on_how_many_chains_run_at_a_time(langevin_defense, images, labels):
    first, other = (
        evaluate(langevin_defense(max_chains=m), images, labels, **BUDGET) for m in (400, 7)
    )
    same(first.records, other.records, rtol=1e-9, atol=1e-9)
    for name, found in first.adversarial.items():
        torch.testing.assert_close(found, other.adversarial[name], rtol=0.0, atol=1e-9)


def test_records_do_not_depend_on_the_size_of_a_shard(
    langevin_defense, images, labels, monkeypatch
):
    whole = evaluate(langevin_defense(), images, labels, **BUDGET)
    monkeypatch.setattr(runner, "SHARD", 3)
    monkeypatch.setattr(runner, "shards_at_once", lambda job: 1)
    parts = evaluate(langevin_defense(), images, labels, **BUDGET)
    same(whole.records, parts.records, rtol=1e-9, atol=1e-9)


def test_shards_are_run_together_until_they_fill_the_chains(
    langevin_defense, images, labels, monkeypatch, tmp_path
):
    monkeypatch.setattr(runner, "SHARD", 3)
    run_shard, sizes = runner.run_shard, []

    def counted(job, ids, meter):
        sizes.append(len(ids))
        return run_shard(job, ids, meter)

    monkeypatch.setattr(runner, "run_shard", counted)
    found = {
        chains: evaluate(
            langevin_defense(max_chains=chains),
            images,
            labels,
            out=tmp_path / str(chains),
            **BUDGET,
        )
        for chains in (5, 12, 400)
    }
    # 3 images of 2 replicates are 6 chains, so 12 chains are two shards.
    assert sizes == [3, 3, 3, 1, 6, 4, 10]
    alone = found[5]
    for chains in (12, 400):
        same(alone.records, found[chains].records, rtol=1e-9, atol=1e-9)
        assert found[chains].chain_steps == pytest.approx(alone.chain_steps)
        for file in (tmp_path / "5" / "shards").glob("*.csv"):
            other = tmp_path / str(chains) / "shards" / file.name
            same(pd.read_csv(file), pd.read_csv(other), rtol=1e-9, atol=1e-9)


def test_adversarial_images_obey_the_threat_model(langevin_defense, images, labels):
    report = evaluate(langevin_defense(), images, labels, **BUDGET)
    for attack, (name, found) in zip(ATTACKS, report.adversarial.items(), strict=True):
        assert float(found.min()) >= 0.0
        assert float(found.max()) <= 1.0
        size = attack.threat.size(found, images)
        assert float(size.max()) <= attack.threat.eps + 1e-6
        assert report.records[f"{name}: size"].tolist() == pytest.approx(size.tolist())


def test_by_a_published_rule_a_natural_error_counts_as_broken_at_the_start(
    langevin_defense, images, labels
):
    protocol = Protocol(
        name="mine", attacks=ATTACKS, judge_replicates=5, verdict=TwoStage(), looks="every"
    )
    records = evaluate(langevin_defense(), images, labels, protocol).records
    errors = records[records["natural"] == 0]
    assert len(errors) >= 2
    assert (errors["1 PGD-3: stands"] == 0).all()
    assert (errors["1 PGD-3: broken at"] == 0).all()


# A run that is cut short.


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(runner, "SHARD", 4)
    monkeypatch.setattr(runner, "shards_at_once", lambda job: 1)


@pytest.fixture
def interrupted(langevin_defense, images, labels, small_shards, tmp_path, monkeypatch):
    """A run folder whose run was cut short in its second shard."""
    run_shard, calls = runner.run_shard, []

    def run_once(*args, **options):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return run_shard(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(runner, "run_shard", run_once)
        with pytest.raises(KeyboardInterrupt):
            evaluate(langevin_defense(), images, labels, **BUDGET, out=tmp_path / "cut")
    return tmp_path / "cut"


def test_a_resumed_run_is_the_uninterrupted_one(
    langevin_defense, images, labels, interrupted, tmp_path
):
    cut = evaluate(langevin_defense(), images, labels, **BUDGET, out=interrupted)
    whole = evaluate(langevin_defense(), images, labels, **BUDGET, out=tmp_path / "whole")
    for name in ("records.csv", "adversarial.safetensors", "table.md", "settings.toml"):
        assert (interrupted / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    same(cut.records, whole.records, rtol=1e-15, atol=0.0)


def test_a_resumed_run_does_not_repeat_a_finished_shard(
    langevin_defense, images, labels, interrupted, monkeypatch
):
    run_shard, calls = runner.run_shard, []

    def count(*args, **options):
        calls.append(args)
        return run_shard(*args, **options)

    monkeypatch.setattr(runner, "run_shard", count)
    evaluate(langevin_defense(), images, labels, **BUDGET, out=interrupted)
    assert len(calls) == 2  # of three shards
    evaluate(langevin_defense(), images, labels, **BUDGET, out=interrupted)
    assert len(calls) == 2


def test_a_run_cut_short_leaves_no_verdict(interrupted):
    assert not (interrupted / "records.csv").exists()
    assert not (interrupted / "table.md").exists()


def test_a_folder_keeps_what_the_report_says(langevin_defense, images, labels, tmp_path):
    report = evaluate(langevin_defense(), images, labels, **BUDGET, out=tmp_path / "run")
    same(pd.read_csv(tmp_path / "run" / "records.csv"), report.records, rtol=1e-12, atol=0.0)
    kept = load_tensors(tmp_path / "run" / "adversarial.safetensors")
    assert kept.keys() == report.adversarial.keys()
    assert all(torch.equal(kept[name], report.adversarial[name]) for name in kept)
    assert (tmp_path / "run" / "table.md").read_text(encoding="utf-8") == report.to_markdown()


def test_a_folder_of_another_seed_is_refused_by_name(langevin_defense, images, labels, interrupted):
    with pytest.raises(UsageError, match=r"other settings \(seed\)"):
        evaluate(langevin_defense(), images, labels, **BUDGET, out=interrupted, seed=1)


def test_a_folder_of_another_attack_is_refused_by_name(
    langevin_defense, images, labels, interrupted
):
    attacks = (ATTACKS[0], dataclasses.replace(ATTACK, steps=4))
    with pytest.raises(UsageError, match="steps"):
        evaluate(
            langevin_defense(),
            images,
            labels,
            attacks=attacks,
            judge_replicates=5,
            out=interrupted,
        )


def test_a_folder_of_other_chains_is_refused(langevin_defense, images, labels, interrupted):
    with pytest.raises(UsageError, match=r"purifier\.steps"):
        evaluate(langevin_defense(steps=4), images, labels, **BUDGET, out=interrupted)


def test_a_folder_of_other_weights_is_refused(langevin_defense, images, labels, interrupted):
    defense = langevin_defense()
    with torch.no_grad():
        defense.classifier[1].weight.mul_(1.01)
    with pytest.raises(UsageError, match="weights"):
        evaluate(defense, images, labels, **BUDGET, out=interrupted)


def test_a_folder_of_other_images_is_refused(langevin_defense, images, labels, interrupted):
    with pytest.raises(UsageError, match=r"data\.sha256"):
        evaluate(langevin_defense(), images.flip(0), labels, **BUDGET, out=interrupted)


def test_a_folder_with_somebody_elses_files_is_refused_and_kept(
    langevin_defense, images, labels, tmp_path
):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="not empty"):
        evaluate(langevin_defense(), images, labels, **BUDGET, out=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_shards_of_unknown_settings_are_refused(langevin_defense, images, labels, interrupted):
    (interrupted / "settings.toml").unlink()
    with pytest.raises(UsageError):
        evaluate(langevin_defense(), images, labels, **BUDGET, out=interrupted, seed=1)


def test_a_file_in_the_folders_place_is_refused(langevin_defense, images, labels, tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(UsageError, match="run"):
        evaluate(langevin_defense(), images, labels, **BUDGET, out=tmp_path / "run")


def empty(path):
    path.write_bytes(b"")


def cut_in_a_row(path):
    text = path.read_text()
    path.write_text(text[: len(text) - len(text.splitlines()[-1]) // 2])


def cut_after_a_row(path):
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-2]))


def overwrite(path):
    path.write_bytes(b"\x80\x81\xff\x00" * 40)


def cut_in_half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def rename_a_column(path):
    path.write_text(path.read_text().replace("label", "libel", 1))


def remove(path):
    path.unlink()


@pytest.mark.parametrize(
    ("pattern", "damage"),
    [
        ("shards/*.csv", empty),
        ("shards/*.csv", cut_in_a_row),
        ("shards/*.csv", cut_after_a_row),
        ("shards/*.csv", overwrite),
        ("shards/*.csv", rename_a_column),
        ("shards/*.safetensors", empty),
        ("shards/*.safetensors", cut_in_half),
        ("shards/*.safetensors", overwrite),
        ("shards/*.safetensors", remove),
        ("settings.toml", empty),
        ("settings.toml", cut_in_half),
        ("settings.toml", overwrite),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_damaged_file_is_refused(langevin_defense, images, labels, interrupted, pattern, damage):
    (file,) = interrupted.glob(pattern)
    damage(file)
    with pytest.raises(UsageError, match=file.stem):
        evaluate(langevin_defense(), images, labels, **BUDGET, out=interrupted)


# Models of any origin.


def linear_function(x):
    generator = torch.Generator().manual_seed(0)
    return x.flatten(1) @ torch.randn((64, 3), generator=generator).to(x)


def test_a_plain_function_is_judged_as_its_own_undefended_self(images):
    labels = linear_function(images).argmax(1)
    report = evaluate(linear_function, images, labels, **BUDGET)
    assert report.share("clean").value == 1.0
    assert set(report.table()["model"]) == {"undefended"}


def test_a_random_function_gets_all_the_draws(images):
    seen = []

    def random_function(x):
        seen.append(len(x))
        return linear_function(x) + 1e-9 * torch.randn((len(x), 3), dtype=x.dtype)

    labels = linear_function(images).argmax(1)
    harmless = PGD(threat=ThreatModel(eps=1e-6), steps=2, step_size=1e-6, replicates=4)
    report = evaluate(random_function, images, labels, attacks=[harmless], judge_replicates=20)
    assert report.robust().value == 1.0
    assert sum(seen) >= len(images) * (20 + 4 + 3 * 4)


def test_a_random_function_of_few_errors_stays_robust(images):
    generator = torch.Generator().manual_seed(0)

    def random_function(x):
        wrong = torch.rand((len(x), 1), generator=generator) < 0.2
        return torch.where(wrong, -1.0, 1.0) * linear_function(x).sign()

    labels = linear_function(images).sign().argmax(1)
    harmless = PGD(threat=ThreatModel(eps=1e-6), steps=10, step_size=1e-6, replicates=1)
    report = evaluate(random_function, images, labels, attacks=[harmless])
    found = report.definitions().set_index(["images of", "definition"])["accuracy"]
    assert found["PGD-10 (BPDA+EOT)", "mean logits of 150"] == 1.0
    # One prediction is one pass.
    assert report.robust().value == found["PGD-10 (BPDA+EOT)", "one pass (mean)"]
    assert abs(report.robust().value - 0.8) < 4 * 0.4 / (len(images) * 150) ** 0.5


def test_a_foreign_purifier_is_judged(images):
    labels = linear_function(images).argmax(1)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).double()
    defense = PurifiedClassifier(network, lambda x: x + 0.01 * torch.randn_like(x), replicates=3)
    first, again = (evaluate(defense, images, labels, **BUDGET) for _ in range(2))
    same(first.records, again.records)


# What is refused, and when.


class Untouched(Purifier):
    """Fails the test when it is asked for more than the first look at one image."""

    def purify(self, images, noise):
        assert len(images) <= 1, "long work had begun"
        return images + 0.0 * noise.normal(0, images)


def untouched(network=None) -> PurifiedClassifier:
    return PurifiedClassifier(network or Constant(3), Untouched())


class Constant(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.classes = classes

    def forward(self, x):
        return torch.zeros((len(x), self.classes), dtype=x.dtype)


class Flat(nn.Module):
    def forward(self, x):
        return x.flatten(1).sum(1)


def refused(*args, match, **options):
    with pytest.raises(UsageError, match=match) as caught:
        evaluate(*args, **options)
    message = str(caught.value)
    assert message.endswith(".")
    assert "\n" not in message


def test_pixels_off_the_scale_are_refused(images, labels):
    refused(untouched(), images * 255, labels, match="255")


def test_normalised_images_are_refused(images, labels):
    refused(untouched(), images * 2 - 1, labels, match=r"\[0, 1\]")


def test_nan_pixels_are_refused(images, labels):
    images[3, 0, 2, 2] = float("nan")
    refused(untouched(), images, labels, match="NaN")


def test_integer_images_are_refused(images, labels):
    refused(untouched(), (images * 255).byte(), labels, match="float")


def test_a_single_image_without_its_batch_is_refused(images, labels):
    refused(untouched(), images[0], labels[:1], match="N, C, H, W")


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 12, 12)])
def test_images_the_model_cannot_take_are_refused(labels, shape):
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(72, 3)).double()
    images = torch.zeros((COUNT, *shape), dtype=torch.float64)
    refused(untouched(network), images, labels, match="cannot take")


def test_images_the_energy_cannot_take_are_refused(langevin_defense, labels):
    images = torch.zeros((COUNT, 3, 8, 8), dtype=torch.float64)
    refused(langevin_defense(), images, labels, match="cannot take", **BUDGET)


def test_labels_beyond_the_classes_are_refused(images, labels):
    refused(untouched(), images, labels + 1, match="labels go up to 3")


def test_negative_labels_are_refused(images, labels):
    refused(untouched(), images, labels - 1, match="0 or more")


def test_too_few_labels_are_refused(images, labels):
    refused(untouched(), images, labels[1:], match="one an image")


def test_labels_of_several_classes_at_once_are_refused(images, labels):
    several = nn.functional.one_hot(labels, 3) + 1
    refused(untouched(), images, several, match="one an image")


def test_a_model_without_classes_is_refused(images, labels):
    refused(untouched(Flat()), images, labels, match="N, classes")


def test_a_model_of_nan_logits_is_refused(images, labels):
    def fails(x):
        return linear_function(x) * float("nan")

    refused(fails, images, labels, match="NaN", **BUDGET)


def test_a_model_without_a_gradient_is_refused_by_attacks_that_need_one(images, labels):
    refused(Constant(3), images, labels, match="gradient", **BUDGET)


def test_no_images_are_refused(images, labels):
    refused(untouched(), images[:0], labels[:0], match="no images")


def test_a_protocol_beside_attacks_is_refused(images, labels):
    refused(untouched(), images, labels, "quick", attacks=ATTACKS, match="not both")


def test_an_unknown_protocol_is_refused_with_the_known_ones(images, labels):
    refused(untouched(), images, labels, "hill2012", match="quick, hill2021")


def test_no_attacks_are_refused(images, labels):
    refused(untouched(), images, labels, attacks=[], match="at least one attack")


def test_no_judge_replicates_are_refused(images, labels):
    refused(untouched(), images, labels, judge_replicates=0, match="judge replicates")


@pytest.mark.parametrize(
    ("budget", "word"),
    [
        ({"stepz": 3}, "stepz"),
        ({"eps": 0.0}, "eps"),
        ({"eps": -8 / 255}, "eps"),
        ({"norm": "L7"}, "Linf, L2"),
        ({"steps": -1}, "steps"),
        ({"step_size": 0.0}, "step_size"),
        ({"replicates": 0}, "replicates"),
        ({"judge_replicates": 0}, "judge replicates"),
    ],
)
@pytest.mark.parametrize("name", ["quick", "hill2021"])
def test_an_impossible_budget_is_refused(name, budget, word):
    with pytest.raises(UsageError, match=word):
        get_protocol(name, **budget)


def test_a_defense_without_replicates_is_refused():
    with pytest.raises(UsageError, match="replicates"):
        PurifiedClassifier(Constant(3), Untouched(), replicates=0)


# Presets.


def test_hill2021_is_the_published_protocol():
    protocol = get_protocol("hill2021")
    transfer, pgd = protocol.attacks
    assert pgd == PGD(
        threat=ThreatModel(norm="Linf", eps=8 / 255), steps=50, step_size=2 / 255, replicates=15
    )
    assert pgd.random_start
    assert pgd.looks == 51
    assert isinstance(transfer, Transfer)
    assert (transfer.attack, transfer.replicates) == (pgd, 15)
    assert protocol.judge_replicates == 150


def test_a_budget_replaces_a_presets_numbers():
    protocol = get_protocol("hill2021", norm="L2", eps=0.5, steps=7, judge_replicates=9)
    pgd = protocol.attacks[-1]
    assert (str(pgd.threat), pgd.steps, pgd.replicates) == ("L2 0.5", 7, 15)
    assert pgd.step_size == 0.125  # the published quarter of eps
    assert (protocol.name, protocol.judge_replicates) == ("hill2021", 9)


def test_judge_replicates_override_a_protocols(langevin_defense, images, labels):
    protocol = Protocol(name="mine", attacks=ATTACKS, judge_replicates=50)
    report = evaluate(langevin_defense(), images, labels, protocol, judge_replicates=3)
    assert report.protocol == dataclasses.replace(protocol, judge_replicates=3)


# What the report says.

PRINTED = {
    "attack": "PGD-3",
    "norm and eps": "Linf 8/255",
    "steps": "3 steps of 4/255",
    "attack replicates": "2 replicates",
    "judge replicates": "5 fresh replicates",
    "Langevin steps": "6 Langevin steps",
    "number of images": "10 images",
    "seed": "seed 11",
    "transfer": "transfer",
}


@pytest.fixture
def report(langevin_defense, images, labels):
    return evaluate(langevin_defense(steps=6), images, labels, **BUDGET, seed=11)


def interval(report) -> str:
    found = report.robust()
    return f"{100 * found.low:.1f} to {100 * found.high:.1f}"


@pytest.mark.parametrize("form", ["to_text", "to_markdown", "to_latex"])
def test_a_printed_report_says_all_that_its_numbers_depend_on(report, form):
    printed = " ".join(getattr(report, form)().split())
    missing = {name for name, text in PRINTED.items() if text.lower() not in printed.lower()}
    assert not missing
    assert interval(report) in printed
    assert f"{100 * report.robust().value:.1f}" in printed


def test_the_caption_says_all_that_the_numbers_depend_on(report):
    caption = report.caption().lower()
    assert not {name for name, text in PRINTED.items() if text.lower() not in caption}


def test_the_latex_escapes_what_latex_would_eat(report):
    body = report.to_latex().replace(latex.PACKAGES, "")
    assert r"\begin{tabular}" in body
    assert all(before == "\\" for before, sign in pairwise(body) if sign in "%_")


def test_the_table_has_a_row_for_each_model_and_attack(report):
    table = report.table()
    assert table["model"].tolist() == ["undefended"] * 2 + ["defended"] * 4
    assert table["attack"].iloc[-1] == "worst of all"
    assert table["attack"].str.contains("PGD-3").sum() == 3
    assert table["attack"].str.contains("transfer").sum() == 1
    assert (table["low"] <= table["accuracy"]).all()
    assert (table["accuracy"] <= table["high"]).all()
    assert (table["images"] == COUNT).all()


def test_the_csv_is_the_table_unrounded(report):
    read = pd.read_csv(io.StringIO(report.to_csv()))
    same(read[["accuracy", "low", "high"]], report.table()[["accuracy", "low", "high"]])


def test_saving_writes_every_form(report, tmp_path):
    folder = report.save(tmp_path / "report")
    written = {p.name: p.read_text(encoding="utf-8") for p in folder.iterdir()}
    assert tomllib.loads(written.pop("flags.toml"))["flag"]
    assert written == {
        "table.txt": report.to_text(),
        "table.md": report.to_markdown(),
        "table.tex": report.to_latex(),
        "table.csv": report.to_csv(),
        "definitions.csv": report.definitions().to_csv(index=False),
    }


def test_the_curve_is_of_the_attacks_own_draws_at_each_step(report):
    curve, courses = report.curve(), report.records["1 PGD-3: course"]
    assert curve.index.tolist() == [0, 1, 2, 3]
    assert (courses.str.len() == ATTACK.steps + 1).all()
    for step in curve.index:
        assert curve[step] == (courses.str[step] == "o").mean()


def test_by_a_published_rule_the_curve_falls_from_the_start_to_robust_accuracy(
    langevin_defense, images, labels
):
    protocol = Protocol(
        name="mine", attacks=(ATTACK,), judge_replicates=5, verdict=TwoStage(), looks="every"
    )
    report = evaluate(langevin_defense(steps=6), images, labels, protocol, seed=11)
    curve = report.curve()
    assert len(curve) == ATTACK.steps + 1
    assert curve.is_monotonic_decreasing
    assert curve.iloc[0] <= report.share("natural").value
    assert curve.iloc[-1] == pytest.approx(report.robust().value)


def test_each_attack_has_its_own_accuracy(report):
    for number, attack in enumerate(ATTACKS):
        stands = report.records[f"{number} {attack.name}: stands"]
        assert report.robust(number).value == stands.mean()


def test_the_cost_is_counted_by_phase(report, langevin_defense):
    assert report.chain_steps["PGD-3"] > 0
    assert report.chain_steps["clean"] == COUNT * 5 * 6
    # Three looks with a gradient and one without, the last look, the judge; candidates besides.
    least = 3 * ATTACK.gradient.chain_steps(langevin_defense(steps=6), 2) + 2 * 6 + (2 + 5) * 6
    assert report.chain_steps["PGD-3"] >= COUNT * least / 2
    assert report.chain_steps["worst of all"] >= COUNT * 5 * 6
    assert set(report.chain_steps) <= set(report.seconds)


@pytest.mark.parametrize("protocol", ["quick", "hill2021"])
def test_records_keep_the_verdict_on_natural_images_whatever_the_protocol(
    protocol: str, langevin_defense
) -> None:
    defense = langevin_defense(steps=1, replicates=2)
    images = torch.rand(4, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 0])
    chosen = get_protocol(protocol, steps=1, replicates=2, judge_replicates=4, eps=0.1)
    report = evaluate(defense, images, labels, chosen)
    assert report.records["natural"].between(0, 1).all()
    assert report.judged_once() == (protocol == "quick")
