"""Compositions purify from the command line: two energies, and class-conditional experts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ebm_defense import load_defense, load_energy
from ebm_defense.errors import UsageError
from ebm_defense.storage.compositions import mixture, part, product, quotient

MODULE = "ebm_defense.storage.compositions"


@pytest.mark.parametrize(
    ("form", "steps"),
    [
        ("product(parts=['{d}', '{d}'], weights=[1, 0.5])", 2),
        ("mixture(parts=['{d}', '{d}#3'], sharpness=25.0)", 2),
        ("quotient(wanted='{d}', negated='{d}#0', strength=0.01)", 4),
    ],
)
def test_a_composition_is_evaluated(form: str, steps: int, run, tiny_defense, tmp_path) -> None:
    spec = f"{MODULE}:{form.format(d=tiny_defense)}"
    words = ("evaluate", "--defense", tiny_defense, "--energy", spec, "--data", "digits")
    chain = ("--langevin-steps", steps, "--langevin-step-size", 0.03, "--temperature", 9e-4)
    few = ("--images", 2, "--attack", "pgd(steps=1)", "--judge-replicates", 16, "--device", "cpu")
    status, printed, _ = run(*words, *chain, *few, "--out", tmp_path / "run")
    assert status == 0
    assert f"{steps} Langevin steps" in printed


def test_an_expert_is_the_energy_of_its_class(tiny_defense: Path) -> None:
    x = torch.rand(3, 1, 8, 8) * 2 - 1
    logits = load_defense(tiny_defense).undefended((x + 1) / 2)
    torch.testing.assert_close(part(f"{tiny_defense}#4")(x), -logits[:, 4])
    energy = load_energy(tiny_defense)
    parts = [str(tiny_defense), f"{tiny_defense}#4"]
    torch.testing.assert_close(product(parts, [2.0, 1.0])(x), 2 * energy(x) - logits[:, 4])
    soft = -torch.logsumexp(-3.0 * torch.stack([energy(x), -logits[:, 4]]), dim=0) / 3.0
    torch.testing.assert_close(mixture(parts, 3.0)(x), soft)
    torch.testing.assert_close(quotient(*parts, 0.1)(x), energy(x) + 0.1 * logits[:, 4])


def test_what_is_no_class_is_refused() -> None:
    with pytest.raises(UsageError, match="must end in the number of a class"):
        part("fashion-mnist#boot")
