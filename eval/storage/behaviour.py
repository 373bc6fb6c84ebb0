"""What a model does, kept beside a run's settings: weights alone do not tell models apart.

Two functions, or modules whose plain attributes differ, may have the same weights or none. So a run
keeps the answers of all that its records depend on, on some of its images and under fixed noise;
before finished shards are used again, the answers of the model at hand are compared with them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ebm_defense.attacks.base import Attack
from ebm_defense.attacks.external.library import forked_generators
from ebm_defense.defense import PurifiedClassifier
from ebm_defense.errors import UsageError
from ebm_defense.noise import KeyedNoise, chain_keys
from ebm_defense.purifiers.base import Purifier, SteppedPurifier

IMAGES = 4
"""How many of the run's images are looked at, each also under noise."""
NOISE = 0.1
"""Its standard deviation, in [0, 1] pixel units: attacked images are not clean ones."""
NUDGE = 1e-5
"""How far pixels are moved to learn how much an answer wobbles with rounding."""
WOBBLES, LEAST = 16.0, 1e-3
"""Answers agree within so many wobbles, or within so many of their standard deviations."""
SHORT = 100
"""Chains of more steps cost too much to be asked as a whole, and amplify any rounding."""
DRAWS = 32
"""Answers are averaged over, of a part that answers the same question twice differently."""
WOBBLE = "wobble "

Answers = dict[str, Tensor]
Ask = Callable[[Tensor], Tensor]


class Behaviour(NamedTuple):
    """The answers that a run keeps, and the images that were asked about, `[n, C, H, W]`."""

    answers: Answers
    images: Tensor


def behaviour(
    defense: PurifiedClassifier, images: Tensor, attacks: Sequence[Attack] = ()
) -> Answers:
    """Return the answers of a defense, and of the models that attacks carry, by the part's name.

    Args:
        defense: what is evaluated.
        images: the run's, `[N, C, H, W]` in [0, 1].
        attacks: the protocol's.

    Returns:
        An answer for each part and, under the same name behind `WOBBLE`, the most by which it
        changes where pixels move by `NUDGE`, or where it is asked again.
    """
    x = _probe(images[:IMAGES])
    keys = chain_keys(0, "nudge", range(len(x)), range(1))[0].to(x.device)
    nudged = x + NUDGE * (2.0 * KeyedNoise(keys).uniform(0, x) - 1.0).sign()
    found: Answers = {}
    for name, ask in _parts(defense, attacks):
        first, second = _answer(ask, x), _answer(ask, x)
        if torch.equal(first, second):
            second = _answer(ask, nudged)
        else:  # noise from a generator of its own, which nothing here can set
            first, second = (_mean_answer(ask, x) for _ in range(2))
        found[name] = first.contiguous()
        found[WOBBLE + name] = (second - first).abs().max().reshape(1)
    return found


def refuse_another(kept: Answers, found: Answers, where: object) -> None:
    """Refuse a model that answers otherwise than the one whose answers were kept.

    Args:
        kept: of the model that began the run.
        found: of the model at hand.
        where: the run, for the message.

    Raises:
        UsageError: they differ by more than rounding, on this device or another, can explain.
    """
    for name in dict.fromkeys([*kept, *found]):
        if not name.startswith(WOBBLE) and not _agree(kept, found, name):
            raise UsageError(
                f"{where} holds a run of another model: on the same images, with the same noise, "
                f"the {name} at hand answers differently; name another folder, or go on with the "
                "model that began it."
            )


def another_part(kept: Behaviour, defense: PurifiedClassifier) -> str | None:
    """Return the first part of a defense that answers otherwise than the run's; None if none does.

    Args:
        kept: of the run; the models that its attacks carry do not count.
        defense: at hand, on the device of the images.
    """
    found = behaviour(defense, kept.images)
    parts = (name for name in found if not name.startswith(WOBBLE))
    return next((name for name in parts if not _agree(kept.answers, found, name)), None)


def _agree(kept: Answers, found: Answers, name: str) -> bool:
    if name not in kept or name not in found or kept[name].shape != found[name].shape:
        return False
    old, new = kept[name], found[name]
    wobble = max(float(answers[WOBBLE + name]) for answers in (kept, found))
    spread = max(float(old.std()) if old.numel() > 1 else 0.0, LEAST * float(old.abs().max()))
    gap = float((new - old).abs().max())
    return gap <= max(WOBBLES * wobble, LEAST * spread) or bool(torch.equal(old, new))


def _probe(images: Tensor) -> Tensor:
    keys = chain_keys(0, "probe", range(len(images)), range(1))[0].to(images.device)
    noised = (images + NOISE * KeyedNoise(keys).normal(0, images)).clamp(0.0, 1.0)
    return torch.cat([images, noised])


def _parts(defense: PurifiedClassifier, attacks: Sequence[Attack]) -> Iterator[tuple[str, Ask]]:
    """Yield what is asked, under the name that messages give it."""
    yield from _of_defense(defense, "")
    for attack in attacks:
        for model in attack.models:
            yield from _of_defense(model, f" of the model that {attack.name} attacks")


def _of_defense(defense: PurifiedClassifier, whose: str) -> Iterator[tuple[str, Ask]]:
    yield f"classifier{whose}", defense.classify
    yield f"undefended classifier{whose}", defense.bare().classify
    for name, ask in _of_purifier(defense.purifier).items():
        yield f"{name}{whose}", ask


def _of_purifier(purifier: Purifier) -> Mapping[str, Ask]:
    """Return a purifier's map and, of a chain, some of its steps; of a long one those alone."""
    whole: dict[str, Ask] = {"purifier": lambda x: purifier(x, noise=_noise(x))}
    if not isinstance(purifier, SteppedPurifier):
        return whole
    last = purifier.chain_steps - 1
    steps = sorted({0, last // 2, last}) if last >= 0 else []
    named = {f"purifier's step {k}": partial(_step, purifier, k) for k in steps}
    return named if last >= SHORT else whole | named


def _step(purifier: SteppedPurifier, number: int, x: Tensor) -> Tensor:
    return purifier.leave(purifier.advance(purifier.enter(x), _noise(x), range(number, number + 1)))


def _noise(x: Tensor) -> KeyedNoise:
    keys = chain_keys(0, "behaviour", range(len(x)), range(1))[0]
    return KeyedNoise(keys.to(x.device))


def _answer(ask: Ask, x: Tensor) -> Tensor:
    # A model may draw from the global generators, and should draw the same each time it is asked.
    with torch.no_grad(), forked_generators(0, x.device):
        return ask(x.clone()).detach().cpu().double()


def _mean_answer(ask: Ask, x: Tensor) -> Tensor:
    total = _answer(ask, x)
    for _ in range(DRAWS - 1):
        total += _answer(ask, x)
    return total / DRAWS
