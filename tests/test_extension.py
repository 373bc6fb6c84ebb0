"""A part of every kind is added from outside of the package, by a line in a registry, and works.

Each is what CONTRIBUTING's table "What to touch" says: one small part, and one entry in a dict.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ebm_defense import PurifiedClassifier, Purifier, load_defense
from ebm_defense.attacks import GRADIENTS, LOSSES, PGD, ThreatModel
from ebm_defense.attacks.catalogue import ATTACKS, Entry
from ebm_defense.attacks.gradients.base import Identity
from ebm_defense.attacks.losses import UntargetedLoss
from ebm_defense.attacks.norms import NORMS
from ebm_defense.attacks.optimisers.ascent import Ascent, Memory
from ebm_defense.commands.main import COMMANDS, main
from ebm_defense.data import DATASETS, DataSet, Images
from ebm_defense.data.sampling import in_memory
from ebm_defense.defense import AVERAGES
from ebm_defense.errors import UsageError
from ebm_defense.eval import PROTOCOLS, Protocol, load_run
from ebm_defense.eval.reporting.flags.registry import FLAGS
from ebm_defense.eval.reporting.renderers import RENDERERS
from ebm_defense.noise import Noise
from ebm_defense.purifiers.registry import PURIFIERS

SMALL = ("--data", "digits", "--images", "2", "--steps", "1", "--replicates", "1")


@dataclass(frozen=True, kw_only=True)
class Halved(Identity):
    """A gradient: half of BPDA's."""

    name: str = "half"

    def purify(self, defense, images, keys):
        purified = super().purify(defense, images, keys)
        return purified._replace(vjp=lambda cotangent: cotangent / 2)


@dataclass(frozen=True, kw_only=True)
class Confidence(UntargetedLoss):
    """A loss: how unsure the defense is of the label."""

    name = "confidence"

    def of(self, logits: Tensor, labels: Tensor) -> Tensor:
        return 1.0 - logits.softmax(-1).gather(-1, labels[:, None]).squeeze(-1)


@dataclass(frozen=True, kw_only=True)
class Still(Ascent):
    """An optimiser that goes nowhere."""

    kind = "Still"

    def move(
        self, x: Tensor, origin: Tensor, gradient: Tensor, memory: Memory, step: int
    ) -> tuple[Tensor, Memory]:
        return origin, memory


class Brighter(Purifier):
    """A purifier: adds a random number to each image."""

    caption = "brighter by {most:g}"
    differentiable = True

    def __init__(self, most: float) -> None:
        super().__init__()
        self.most = most

    def purify(self, images: Tensor, noise: Noise) -> Tensor:
        return images + self.most * noise.normal(0, images[:, :, :1, :1])


@pytest.fixture
def evaluated(tiny_defense, tmp_path, capsys) -> Callable[..., tuple[str, Path]]:
    """Evaluate from the command line; return what it printed, and its folder."""

    def run(*words: str) -> tuple[str, Path]:
        out = tmp_path / "run"
        judged = ("--judge-replicates", "2", "--out", str(out))
        status = main(["evaluate", "--defense", str(tiny_defense), *SMALL, *judged, *words])
        printed = capsys.readouterr()
        assert status == 0, printed.err
        return " ".join(printed.out.split()), out

    return run


def test_a_purifier(evaluated, tiny_defense, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(PURIFIERS, "brighter", Brighter)
    words = ("--purifier", "brighter:0.25", "--judge-replicates", "16", "--attack", "pgd")
    said, out = evaluated(*words, "--gradient", "full")
    assert "Purifier: brighter by 0.25" in said
    assert "around the chain" not in said
    assert main(["verify", str(out), "--replicates", "16"]) == 0

    classifier = load_defense(tiny_defense).classifier
    folder = PurifiedClassifier(classifier, Brighter(0.5), seed=0).save(tmp_path / "defense")
    assert load_defense(folder).purifier.most == 0.5


def test_a_gradient_and_a_loss(evaluated, monkeypatch) -> None:
    monkeypatch.setitem(GRADIENTS, "half", Halved)
    monkeypatch.setitem(LOSSES, "confidence", Confidence)
    said, out = evaluated("--attack", "pgd", "--gradient", "half", "--loss", "confidence")
    attack = load_run(out).protocol.attacks[0]
    assert "PGD-confidence-1" in said
    assert "half gradient" in said
    assert (attack.gradient.name, attack.loss.name) == ("half", "confidence")


def test_an_optimiser(evaluated, monkeypatch, capsys) -> None:
    monkeypatch.setitem(ATTACKS, "still", Entry(Still, "goes nowhere", "nobody"))
    said, out = evaluated("--attack", "still(random_start=False)", "--eps", "0.1")
    assert "Still-CE-1" in said
    run = load_run(out)
    assert torch.equal(next(iter(run.adversarial.values())), run.originals)
    main(["attacks", "--no-libraries"])
    assert "goes nowhere (nobody)" in capsys.readouterr().out


def test_a_norm(evaluated, monkeypatch) -> None:
    linf = NORMS["Linf"]

    def left_half(delta: Tensor, *limits: Tensor | float) -> Tensor:
        kept = linf.project(delta, *limits)
        kept[..., 4:] = 0.0
        return kept

    monkeypatch.setitem(NORMS, "left", replace_norm(linf, project=left_half))
    said, out = evaluated("--attack", "bpda", "--norm", "left", "--eps", "0.3")
    assert "left 0.3" in said
    run = load_run(out)
    moved = next(iter(run.adversarial.values())) - run.originals
    assert moved[..., :4].abs().max() > 0.1
    assert moved[..., 4:].abs().max() == 0.0


def replace_norm(norm, **parts):
    return norm._replace(**parts)


def test_a_data_set(evaluated, monkeypatch) -> None:
    grey = in_memory(Images(torch.full((4, 1, 8, 8), 0.5), torch.arange(4)), ("a", "b", "c", "d"))
    monkeypatch.setitem(DATASETS, "grey", DataSet(open=lambda *_: grey, eps=0.07))
    said, out = evaluated("--data", "grey", "--attack", "bpda")
    assert "Linf 0.07" in said
    assert load_run(out).originals.unique().tolist() == [0.5]


def test_a_protocol(evaluated, monkeypatch) -> None:
    def gentle(budget):
        """One attack that stays at the image."""
        number = budget.over(norm="Linf", eps=0.5, steps=3, replicates=2)
        threat = ThreatModel(norm=number["norm"], eps=number["eps"])
        attack = PGD(threat=threat, steps=number["steps"], replicates=1, random_start=False)
        return Protocol(name="gentle", attacks=(attack,), judge_replicates=2)

    monkeypatch.setitem(PROTOCOLS, "gentle", gentle)
    said, out = evaluated("--protocol", "gentle")
    assert "Protocol gentle" in said
    assert load_run(out).protocol.name == "gentle"


def test_a_flag(evaluated, monkeypatch) -> None:
    def few(evidence):
        if len(evidence.records) < 3:
            yield f"{len(evidence.records)} images", ()

    monkeypatch.setitem(FLAGS, "few images", (few, "Take more."))
    said, out = evaluated("--attack", "bpda")
    assert re.search(r"few images: 2 images\. Take more\.", said)
    assert "few images" in {flag.name for flag in load_run(out).flags}


def test_a_table_format(evaluated, tmp_path, monkeypatch) -> None:
    def bars(table):
        rows = [table.head, *([cell.text for cell in row] for row in table.rows)]
        return "\n".join("|".join(row) for row in rows)

    monkeypatch.setitem(RENDERERS, "bars", bars)
    _, out = evaluated("--attack", "bpda")
    report = load_run(out)
    report.write(tmp_path, "table", "bars")
    head, *rows = (tmp_path / "table.bars").read_text().splitlines()
    assert head.startswith("model|attack|")
    assert [row.split("|")[0] for row in rows] == ["undefended"] * 2 + ["defended"] * 2
    with pytest.raises(UsageError, match=r"choose one of text, .*bars"):
        report.to("org")


def test_an_average(evaluated, monkeypatch) -> None:
    monkeypatch.setitem(AVERAGES, "median", lambda logits: logits.median(0).values)
    _, out = evaluated("--attack", "bpda", "--average", "median")
    assert load_run(out).settings["defense"]["average"] == "median"


def test_a_command(tmp_path, monkeypatch, capsys) -> None:
    assert {"evaluate", "attacks"} <= set(COMMANDS)
    entry = replace_norm(COMMANDS["attacks"], summary="the same again")
    monkeypatch.setitem(COMMANDS, "again", entry)
    assert main(["--help"]) == 0
    assert "again" in capsys.readouterr().out
    assert main(["again", "--no-libraries"]) == 0
    assert "square" in capsys.readouterr().out


def test_the_table_of_what_to_touch_names_registries_that_are_there() -> None:
    text = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text.partition("## What to touch")[2].partition("##")[0]
    rows = [line.split("|")[1:4] for line in section.splitlines() if line.startswith("| a")]
    assert len(rows) >= 9
    for _, place, registry in rows:
        if registry.strip().startswith("nothing"):
            continue
        name = re.search(r"`(\w+)`", registry)[1]
        files = re.findall(r"`([\w/]+(?:NAME)?\.py)`", place) + re.findall(
            r"`([\w/]+\.py)`", registry
        )
        home = files[-1]
        source = (Path(__file__).parents[1] / home).read_text(encoding="utf-8")
        there = re.search(rf"^({name}\b.* = |def {name}\()", source, re.M)
        assert there, f"{home} has no {name}"
        assert len(files) <= 2
