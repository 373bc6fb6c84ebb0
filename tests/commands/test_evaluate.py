"""`ebm-defense evaluate`."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from ebm_defense import load_defense
from ebm_defense.commands.evaluation.evaluate import Evaluate
from ebm_defense.eval import get_protocol
from ebm_defense.purifiers.baselines import Jpeg, NoPurifier
from ebm_defense.storage.fingerprint import fingerprint

SMALL = ("--data", "digits", "--images", 6, "--steps", 2, "--replicates", 2)


def small(defense: Path, out: Path, *more: object) -> tuple[object, ...]:
    return ("evaluate", "--defense", defense, *SMALL, "--judge-replicates", 3, "--out", out, *more)


def test_a_run_prints_the_table_and_keeps_everything(run, tiny_defense, tmp_path) -> None:
    out = tmp_path / "run"
    status, printed, _ = run(*small(tiny_defense, out))
    assert status == 0
    for word in ("undefended", "defended", "smoothed", "Linf 0.1", "3 Langevin steps", str(out)):
        assert word in printed
    kept = {p.name for p in out.iterdir()}
    assert kept >= {
        "adversarial.safetensors",
        "environment.toml",
        "purification.png",
        "records.csv",
        "settings.toml",
        "table.csv",
        "table.md",
        "table.tex",
    }
    assert len(pd.read_csv(out / "records.csv")) == 6
    with Image.open(out / "purification.png") as picture:
        assert picture.width > 300


def test_the_same_command_twice_gives_the_same_records(run, tiny_defense, tmp_path) -> None:
    for name in ("a", "b"):
        assert run(*small(tiny_defense, tmp_path / name))[0] == 0
    for file in ("records.csv", "adversarial.safetensors", "table.csv", "settings.toml"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_folder_of_another_run_is_never_overwritten(run, tiny_defense, tmp_path) -> None:
    out = tmp_path / "run"
    assert run(*small(tiny_defense, out))[0] == 0
    before = (out / "records.csv").read_bytes()
    status, _, err = run(*small(tiny_defense, out, "--seed", 1))
    assert status == 2
    assert "seed" in err
    assert (out / "records.csv").read_bytes() == before


@pytest.fixture
def briefly_timed(monkeypatch) -> None:
    """Forecasts that are as true of their counts and less of their times."""
    monkeypatch.setattr("ebm_defense.eval.speed.forecast.TIMED_SECONDS", 0.01)


@pytest.mark.usefixtures("briefly_timed")
def test_dry_run_prints_the_cost_and_writes_nothing(run, tiny_defense, tmp_path) -> None:
    out = tmp_path / "run"
    status, printed, _ = run(*small(tiny_defense, out, "--dry-run"))
    assert status == 0
    # 6 images × 3 Langevin steps × (3 clean + (2 attack steps + start) × 2 replicates + 16 draws of
    # each of the three candidates + 2 of the chosen one as the attack sees it + 3 of the judge),
    # and 2 for the one product of each smoothed gradient
    gradients = 6 * 2 * 2 * 2
    assert f"chain-steps: {6 * 3 * (3 + 3 * 2 + 3 * 16 + 2 + 3) + gradients:,}" in printed
    assert "expected time" in printed
    assert "memory" in printed
    assert not out.exists()


@pytest.mark.usefixtures("briefly_timed")
def test_a_dry_run_promises_no_number_that_a_library_decides(run, tiny_defense) -> None:
    numbers = ("--images", 6, "--replicates", 2, "--judge-replicates", 3, "--dry-run")
    words = ("evaluate", "--defense", tiny_defense, "--data", "digits", *numbers, "--attack")
    printed = run(*words, "foolbox:LinfDeepFoolAttack")[1]
    # 2 draws of the final image are all that is sure of the attack.
    assert f"chain-steps: at least {6 * 3 * (3 + 2 + 2 + 3):,} if" in printed
    assert "how often foolbox LinfDeepFoolAttack asks the defense depends on the library" in printed
    assert "expected time: at least" in printed
    printed = run(*words, "torchattacks:PGD(steps=3)")[1]
    assert f"chain-steps: {6 * 3 * (3 + 2 + (3 + 1) * 2 + 3):,} if" in printed
    assert "depends" not in printed


@pytest.mark.parametrize(
    "purifier", ["none", "gaussian:0.1", "jpeg:75", "bits:3", "tv:0.1", "median:3"]
)
def test_every_baseline_is_evaluated(run, tiny_defense, tmp_path, purifier: str) -> None:
    judge = ("--judge-replicates", 16)  # as many as a purifier of one's own is averaged over
    status, printed, _ = run(*small(tiny_defense, tmp_path / "run", "--purifier", purifier, *judge))
    assert status == 0
    assert "PGD-2" in printed


OWN_PARTS = """
import torch
from torch import nn

class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 10)

    def forward(self, x):
        return self.linear(x.flatten(1))

class Bowl(nn.Module):
    def forward(self, x):
        return x.square().flatten(1).sum(1)

def blur():
    return nn.AvgPool2d(3, 1, 1)

number = 3
"""


@pytest.fixture
def own_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "ownparts.py").write_text(OWN_PARTS)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_a_users_own_parts(run, own_parts: Path) -> None:
    import torch
    from torch import nn

    weights = own_parts / "linear.pt"
    torch.save({f"linear.{k}": v for k, v in nn.Linear(64, 10).state_dict().items()}, weights)
    own = ("--classifier", "ownparts:Linear", "--classifier-weights", weights)
    energy = ("--energy", "ownparts:Bowl", "--langevin-steps", 4, "--temperature", 1.0)
    head = ("evaluate", *SMALL, "--judge-replicates", 16)
    status, printed, _ = run(*head, *own, *energy, "--out", own_parts / "energy")
    assert status == 0
    assert "4 Langevin steps" in printed
    blur = ("--purifier", "ownparts:blur")
    assert run(*head, *own, *blur, "--out", own_parts / "blur")[0] == 0


def test_the_undefended_classifier_is_named_on_the_command_line() -> None:
    shipped = load_defense("fashion-mnist")
    bare = Evaluate(classifier="undefended", purifier="none").make_defense()
    behind = Evaluate(classifier="undefended", purifier="jpeg:75").make_defense()
    own = Evaluate(purifier="none").make_defense()
    assert isinstance(bare.purifier, NoPurifier)
    assert isinstance(behind.purifier, Jpeg)
    for found, meant in ((bare, "undefended"), (behind, "undefended"), (own, "classifier")):
        assert fingerprint(found.classifier) == fingerprint(getattr(shipped, meant))
        assert fingerprint(found.undefended) == fingerprint(shipped.undefended)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--eps", 0), "eps must be above 0"),
        (("--replicates", 0), "replicates ≥ 1"),
        (("--judge-replicates", 0), "at least 1"),
        (("--norm", "L7"), "unknown norm 'L7'"),
        (("--data", "nowhere"), "unknown data set 'nowhere'"),
        (("--protocol", "nothing"), "unknown protocol 'nothing'"),
        (("--attack", "magic"), "unknown attack 'magic'"),
        (("--defense", "nothing"), "no defense 'nothing'"),
        (("--data", "fashion-mnist-sample"), "cannot take images of shape (1, 28, 28)"),
        (("--purifier", "magic"), "unknown purifier 'magic'"),
        (("--purifier", "jpeg:fine"), "number"),
        (("--classifier", "nocolon"), "package.module:factory"),
        (("--classifier", "ownparts:Nothing"), "cannot be imported"),
        (("--classifier", "ownparts:number"), "not callable"),
        (("--classifier-weights", "a.pt"), "a.pt are weights of no network"),
        (("--classifier", "undefended", "--classifier-weights", "a.pt"), "weights of no network"),
        (("--energy-weights", "a.pt"), "weights of no network"),
        (("--energy", "ownparts:Bowl", "--purifier", "none"), "not both"),
        (("--precision", "fp8"), "precision"),
        (("--out", "/proc/nowhere"), "cannot be written"),
        (("--langevin-steps", -1), "0 or more"),
    ],
)
def test_mistakes_are_named_and_exit_with_2(run, tiny_defense, own_parts, words, said) -> None:
    status, _, err = run(*small(tiny_defense, own_parts / "run", *words))
    assert status == 2
    assert said in err
    assert len(err.strip().splitlines()) == 1


def test_cuda_asked_for_and_absent(run, tiny_defense, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    status, _, err = run(*small(tiny_defense, tmp_path / "run", "--device", "cuda"))
    assert status == 2
    assert "CUDA" in err


def test_a_protocol_comes_from_a_file(run, tiny_defense, tmp_path) -> None:
    file = get_protocol("quick", eps=0.05, steps=1, replicates=2, judge_replicates=3).save(
        tmp_path / "mine.toml"
    )
    given = ("evaluate", "--defense", tiny_defense, "--data", "digits", "--images", 6)
    status, printed, _ = run(*given, "--protocol", file, "--out", tmp_path / "run")
    assert status == 0
    assert "Linf 0.05, 1 steps" in printed
    status, _, err = run(*given, "--protocol", file, "--steps", 3, "--out", tmp_path / "other")
    assert status == 2
    assert "steps" in err


def test_a_verdict_may_be_sequential(run, tiny_defense, tmp_path) -> None:
    out = tmp_path / "run"
    more = ("--verdict", "sequential", "--alpha", 0.05)
    status, printed, _ = run(*small(tiny_defense, out, *more))
    assert status == 0
    assert "error level 0.05" in printed


def test_an_eps_may_be_a_fraction_and_a_norm_in_any_case(run, tiny_defense, tmp_path) -> None:
    out = tmp_path / "run"
    status, printed, _ = run(*small(tiny_defense, out, "--eps", "8/255", "--norm", "linf"))
    assert status == 0
    assert "Linf 8/255" in printed
    settings = tmp_path / "settings.toml"
    settings.write_text('eps = "16/255"\nstep-size = 0.01\n')
    words = small(tiny_defense, tmp_path / "other", "--config", settings)
    status, printed, _ = run(*words)
    assert status == 0
    assert "Linf 16/255, 2 steps of 0.01" in printed


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--norm", "L2"), "digits has no customary eps in L2"),
        (("--eps", "8"), "did you mean 8/255"),
        (("--bits", 8), "bits=8 the images must lie on that lattice"),
        (("--bits", 9), "from 1 to 8"),
        (("--looks", "some"), "choose one of selected, every, last"),
        (("--loss", "towards(target=10)"), "needs a model of 11 classes"),
    ],
)
def test_what_does_not_fit_is_told_before_anything_is_written(
    run, tiny_defense, tmp_path, words, said
) -> None:
    out = tmp_path / "run"
    status, _, err = run(*small(tiny_defense, out, *words))
    assert status == 2
    assert said in err
    assert not out.exists()


def test_looks_and_a_chosen_class_are_options(run, tiny_defense, tmp_path) -> None:
    out = tmp_path / "run"
    words = ("--looks", "last", "--loss", "towards(target=3)")
    status, printed, _ = run(*small(tiny_defense, out, *words))
    assert status == 0
    assert "Only the images that an attack ends with are judged" in printed
    records = pd.read_csv(out / "records.csv")
    assert set(records["0 PGD-CE to class 3-2: predicted"]) <= set(range(10))


def test_a_sweep_takes_fractions(run, tiny_defense, tmp_path) -> None:
    out = tmp_path / "grid"
    assert run(*small(tiny_defense, out, "--sweep", "eps=4/255,8/255"))[0] == 0
    assert len([path for path in out.iterdir() if path.is_dir()]) == 2
