"""Energy learning on several processes, in parts, and after every kind of stop."""

from __future__ import annotations

import importlib.util
import math
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from ebm_defense.data import load_data
from ebm_defense.errors import UsageError
from ebm_defense.langevin import LangevinSettings
from ebm_defense.learning.energies.recipe import EnergyRecipe
from ebm_defense.learning.energies.trainer import DivergedError, EnergyTrainer
from ebm_defense.learning.parallel import Team

_SCRIPT = Path(__file__).parent / "ranks.py"
_SPEC = importlib.util.spec_from_file_location("ranks", _SCRIPT)
assert _SPEC is not None
assert _SPEC.loader is not None
ranks = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(ranks)
tiny_trainer, weights, advance = ranks.tiny_trainer, ranks.weights, ranks.advance


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """Two processes over gloo; the second is killed in the end, and the first fails of it."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    here = os.environ | {
        "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, str(_SCRIPT), str(folder)],
            env=here | {"RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert processes[1].returncode == -signal.SIGKILL, "\n".join(errors)
    assert processes[0].returncode not in (0, None)
    return folder, errors


@pytest.fixture(scope="module")
def alone():
    trainer = tiny_trainer()
    advance(trainer, 10)
    return trainer


def test_two_ranks_make_the_updates_of_one_process(together, alone):
    found = torch.load(together[0] / "found.pt", weights_only=True)
    # Sums of the same numbers in another order, ten updates long.
    torch.testing.assert_close(found["weights"], weights(alone), rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(found["history"], torch.tensor(alone.history), rtol=1e-3, atol=1e-3)


def test_two_ranks_teach_one_generator(together):
    """Chains begin at it on both ranks, or on one, or on none."""
    pair = tiny_trainer(fresh="cooperative")
    advance(pair, 3)
    found = torch.load(together[0] / "found.pt", weights_only=True)["momentum"]
    assert float(found.abs().max()) > 0
    torch.testing.assert_close(found, ranks.momentum(pair), rtol=1e-2, atol=1e-7)


def test_two_ranks_go_on_exactly(together):
    assert torch.load(together[0] / "found.pt", weights_only=True)["exact"]


def test_a_killed_rank_costs_no_more_than_the_updates_since_the_checkpoint(together):
    """What two ranks saved, one goes on from."""
    trainer = tiny_trainer()
    trainer.load(together[0] / "lost.pt")
    assert ranks.KILLED - 1 - trainer.done < ranks.EVERY
    whole = tiny_trainer()
    for each in (trainer, whole):
        advance(each, 12)
    torch.testing.assert_close(weights(trainer), weights(whole), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("accumulate", [2, 3, 8])
def test_a_batch_in_parts_is_the_same_update(alone, accumulate):
    trainer = tiny_trainer(accumulate=accumulate)
    advance(trainer, 10)
    torch.testing.assert_close(weights(trainer), weights(alone), rtol=1e-4, atol=2e-5)


def test_a_batch_that_ranks_cannot_share_is_refused():
    with pytest.raises(UsageError, match="8 images cannot be shared evenly by 3 processes"):
        tiny_trainer(Team(0, 3))
    with pytest.raises(UsageError, match="choose a multiple of 12"):
        tiny_trainer(Team(0, 2), batch=10, accumulate=6)


LONG = {"updates": 60, "sgd_from": 40, "adam_lr": 1e-3, "fresh": "cooperative"}
"""Adam, then SGD, and a generator that learns along."""


def test_ten_kills_at_any_instant_change_nothing(tmp_path):
    """A child of this process learns and is killed, again and again, in updates and in saving."""
    path, moment = tmp_path / "state.pt", random.Random(0)
    whole = tiny_trainer(**LONG)
    begun = time.perf_counter()
    advance(whole, LONG["updates"])
    a_run = time.perf_counter() - begun
    for _ in range(10):
        child = os.fork()
        if child == 0:
            _learn_forever(path)
        time.sleep(moment.uniform(0.0, 0.3 * a_run))
        os.kill(child, signal.SIGKILL)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    resumed = tiny_trainer(**LONG)
    resumed.load(path)
    advance(resumed, LONG["updates"], path)
    assert torch.equal(weights(resumed), weights(whole))
    assert resumed.history == whole.history


def _learn_forever(path: Path) -> None:
    """Go on from the checkpoint, to the end, and wait; never return into the tests."""
    try:
        trainer = tiny_trainer(**LONG)
        if path.exists():
            trainer.load(path)
        trainer.save(path)
        advance(trainer, LONG["updates"], path)
    finally:
        while True:
            signal.pause()


# Divergence


class Trap(nn.Module):
    """An energy that runs away wherever its weight has gone beyond 1, as too fast learning does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        size = x.square().flatten(1).sum(1)
        bad = torch.where(self.weight > 1.0, math.nan, 0.0).detach()
        return -self.weight * size + bad * size


def trap_trainer(**options) -> EnergyTrainer:
    base = {
        "updates": 12, "batch": 8, "bank": 8, "start": "noise", "adam_lr": 0.1, "final_lr": 0.1,
        "langevin": LangevinSettings(steps=1, step_size=0.01, temperature=1.0),
    }  # fmt: skip
    images = load_data("digits", "train").images[:60]
    return EnergyTrainer(Trap(), images, EnergyRecipe(**(base | options)), "fp32")


def test_divergence_leads_back_with_half_the_rate_and_says_so(tmp_path, caplog):
    trainer = trap_trainer()
    trainer.save(tmp_path / "state.pt")
    seen = [(u.number, trainer.optimiser.param_groups[0]["lr"]) for u in trainer.run()]
    assert trainer.done == 12
    assert trainer.setbacks == 2
    # Six steps of 0.1 lead beyond 1, twelve of 0.05 as well, twelve of 0.025 do not.
    assert [n for n, _ in seen].count(1) == 3
    assert seen[-1] == (12, pytest.approx(0.025))
    said = [r.getMessage() for r in caplog.records]
    assert "goes on from update 0 with 1/2 of the learning rate (setback 1 of 3)" in said[0]
    assert "1/4 of the learning rate (setback 2 of 3)" in said[1]
    assert [u.number for u in trainer.history] == list(range(1, 13))


def test_setbacks_are_kept_with_the_checkpoint(tmp_path):
    trainer = trap_trainer()
    trainer.save(tmp_path / "state.pt")
    list(trainer.run())
    trainer.save(tmp_path / "later.pt")
    again = trap_trainer()
    again.load(tmp_path / "later.pt")
    assert again.setbacks == 2


def test_after_so_many_setbacks_learning_ends(tmp_path):
    trainer = trap_trainer(setbacks=1)
    trainer.save(tmp_path / "state.pt")
    with pytest.raises(DivergedError, match="diverged at update"):
        list(trainer.run())
    with pytest.raises(DivergedError):  # nothing was ever saved
        list(trap_trainer().run())
