"""What makes the documentation's code quick: few images, short chains, small attacks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

import ebm_defense
from ebm_defense import LangevinPurifier, PurifiedClassifier
from ebm_defense import eval as judging
from ebm_defense.data import Images

LIMITS = {"steps": 1, "replicates": 2, "targets": 1, "samples": 2, "restarts": 1}
"""The largest numbers that a part of an attack may have."""
IMAGES, CHAIN, DRAWS = 2, 1, 2


def small(part: Any) -> Any:
    """Return an attack, gradient or loss with its numbers cut down to `LIMITS`."""
    cut: dict[str, Any] = {}
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        if field.name in LIMITS and isinstance(value, int):
            cut[field.name] = min(value, LIMITS[field.name])
        elif dataclasses.is_dataclass(value):
            cut[field.name] = small(value)
    return dataclasses.replace(part, **cut) if cut else part


def few_images(name: str, split: str = "test", limit: int | None = None, **_: Any) -> Images:
    """Load what ships, whatever was asked for: other data sets are not on every machine."""
    return _load_data("fashion-mnist-sample", "test", min(limit or IMAGES, IMAGES))


def short_chains(name: str = "fashion-mnist", **options: Any) -> Any:
    defense = _load_defense(name, **{"replicates": 2} | options)
    if isinstance(defense.purifier, LangevinPurifier):
        chain = dataclasses.replace(defense.purifier.settings, steps=CHAIN)
        defense.purifier.settings, defense.purifier.precision = chain, "fp32"
    defense.verdict_precision = "fp32"
    return defense


def small_evaluation(
    model: Any,
    images: Any,
    labels: Any,
    protocol: Any = None,
    *,
    attacks: Any = None,
    **options: Any,
) -> Any:
    if attacks is None:
        chosen = protocol if isinstance(protocol, judging.Protocol) else None
        chosen = chosen or judging.get_protocol(protocol or "quick", eps=0.1)
        protocol = dataclasses.replace(chosen, attacks=tuple(map(small, chosen.attacks)))
    else:
        attacks = [small(attack) for attack in attacks]
    if isinstance(model, PurifiedClassifier):
        model.replicates = min(model.replicates, DRAWS)
    draws = min(options.pop("judge_replicates", None) or DRAWS, DRAWS)
    return _evaluate(
        model, images, labels, protocol, attacks=attacks, judge_replicates=draws, **options
    )


_load_data, _load_defense, _evaluate = (
    ebm_defense.load_data,
    ebm_defense.load_defense,
    judging.evaluate,
)


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Images]:
    """Make what the documentation's code calls quick; it is the same code otherwise."""
    monkeypatch.setattr(ebm_defense, "load_data", few_images)
    monkeypatch.setattr(ebm_defense, "load_defense", short_chains)
    monkeypatch.setattr(judging, "evaluate", small_evaluation)
    return few_images
