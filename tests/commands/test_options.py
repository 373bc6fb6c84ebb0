"""Each process computes on a device of its own."""

from __future__ import annotations

import pytest
import torch

from ebm_defense import UsageError
from ebm_defense.commands.options.shared import resolve_device


@pytest.fixture
def gpus(monkeypatch):
    """Two GPUs; return which of them became the process's own."""
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return chosen


@pytest.mark.parametrize("asked", ["auto", "cuda"])
@pytest.mark.parametrize(("rank", "number"), [(None, 0), ("0", 0), ("1", 1)])
def test_each_process_of_torchrun_takes_the_gpu_of_its_number(
    asked, rank, number, gpus, monkeypatch
):
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    own = torch.device("cuda", number)
    assert resolve_device(asked) == own
    assert gpus == [own]


@pytest.mark.parametrize("rank", ["2", "-1", "one", ""])
def test_more_processes_than_gpus_are_refused_in_a_sentence(rank, gpus, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", rank)
    with pytest.raises(UsageError, match=r"has 2 GPUs; start at most as many"):
        resolve_device("auto")
    assert not gpus
    assert resolve_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(("asked", "what"), [("cuda", "no GPU"), ("mps", "no Apple GPU")])
def test_a_device_that_is_not_here_is_refused(asked, what, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UsageError, match=what):
        resolve_device(asked)
    assert resolve_device("auto") == torch.device("cpu")
