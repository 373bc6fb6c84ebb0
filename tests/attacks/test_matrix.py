"""Attack × gradient × loss × norm: each runs within its threat model, or says at once why not."""

import itertools

import pytest
import torch

from ebm_defense import UsageError
from ebm_defense.attacks import ATTACKS, GRADIENTS, LOSSES, ThreatModel, make_attack
from ebm_defense.attacks.catalogue import takes
from ebm_defense.attacks.losses import takes_targets
from ebm_defense.attacks.norms import NORMS
from ebm_defense.attacks.spec import parse

EPS = {"Linf": 0.05, "L2": 0.3, "L1": 0.8}
SMALL = {"steps": 2, "replicates": 2, "restarts": 1, "targets": 2, "review": 1}
CHEAP = {"surrogate": "surrogate(steps=1)", "score-free": "score-free(samples=2)"}
PULLBACKS = {"auto", "bpda", "full", "smoothed"}
GRADIENTS_OF = {"diffhammer": PULLBACKS, "spsa": {"score-free"}}
LEFT_OUT = None


def fits(attack: str, gradient: str | None, loss: str | None) -> bool:
    """Whether the three go together, as they are documented."""
    through = gradient in (GRADIENTS_OF.get(attack, set(GRADIENTS)) | {LEFT_OUT})
    taken = {part for part, name in (("gradient", gradient), ("loss", loss)) if name}
    aimed = loss is LEFT_OUT or takes_targets(LOSSES[loss]()) == (attack == "apgd-t")
    return through and aimed and taken <= takes(attack)


def attempt(name, norm, defense, **parts):
    """Make an attack and run it; return what it found, or why it would not."""
    images = torch.rand((2, 1, 8, 8), generator=torch.Generator().manual_seed(0)).double()
    threat = ThreatModel(norm=norm, eps=EPS[norm])
    small = {k: v for k, v in SMALL.items() if k in takes(name)}
    try:
        attack = make_attack(name, threat=threat, **small, **parts)
    except UsageError as error:
        return str(error)
    found = attack(defense, images, torch.arange(2))
    assert found.shape == images.shape
    assert float(found.min()) >= 0.0
    assert float(found.max()) <= 1.0
    assert bool((threat.size(found, images) <= threat.eps * (1 + 1e-9)).all())
    assert bool((found != images).flatten(1).any(1).all())
    assert attack.chain_steps(defense) > 0
    return None


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ATTACKS)
def test_parts_go_together_or_say_at_once_why_not(name, norm, langevin_defense):
    defense, offered = langevin_defense(steps=2, classes=5), {"gradient": GRADIENTS, "loss": LOSSES}
    gradients, losses = (
        [*choices, *([] if part in takes(name) else [LEFT_OUT])]
        for part, choices in offered.items()
    )
    for gradient, loss in itertools.product(gradients, losses):
        parts = {"gradient": CHEAP.get(gradient, gradient), "loss": loss}
        why = attempt(name, norm, defense, **{k: v for k, v in parts.items() if v is not LEFT_OUT})
        assert (why is None) == fits(name, gradient, loss), (gradient, loss, why)
        assert why is None or (why.endswith(".") and "\n" not in why)


def test_what_is_cheap_is_registered():
    assert {parse(text).name for text in CHEAP.values()} == set(CHEAP) <= set(GRADIENTS)
