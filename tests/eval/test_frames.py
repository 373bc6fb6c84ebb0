"""From `evaluate` to a chain's step it is a short way; `pytest -s` prints every one."""

from __future__ import annotations

import sys
from types import FrameType

from ebm_defense import langevin
from ebm_defense.attacks import PGD
from ebm_defense.eval import evaluate

MOST = 12
"""Frames of an attack's query, the evaluation and the step included."""


def frames_to(frame: FrameType | None) -> list[str]:
    """Return the functions from `evaluate` to this frame, both included."""
    names: list[str] = []
    while frame is not None and (not names or names[-1] != "evaluate"):
        names.append(getattr(frame.f_code, "co_qualname", frame.f_code.co_name))
        frame = frame.f_back
    return names[::-1]


def test_few_functions_lie_between_an_evaluation_and_an_attacks_step(small, monkeypatch):
    step, ways = langevin.langevin_step, set()

    def recorded(*arguments, **options):
        ways.add((*frames_to(sys._getframe(1)), "langevin_step"))
        return step(*arguments, **options)

    monkeypatch.setattr(langevin, "langevin_step", recorded)
    attack = PGD(steps=1, replicates=2)
    evaluate(
        small.defense(steps=1), small.images, small.labels, attacks=[attack], judge_replicates=4
    )
    for way in sorted(ways, key=len):
        print(len(way), " > ".join(way))
    attacking = [w for w in ways if "run" in w and "AttackSession.query" in w]
    assert attacking
    assert max(map(len, attacking)) <= MOST
