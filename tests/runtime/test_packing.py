"""Chains are packed to the memory there is; what is computed does not depend on it."""

from __future__ import annotations

import logging

import pytest
import torch

from ebm_defense import PurifiedClassifier, UsageError
from ebm_defense.engine import ENGINES, Engine, prepare, prepare_product
from ebm_defense.runtime.packing import LARGEST, READY, USUAL, Packing, chains_in


class Small:
    """A function that runs out of memory on more than `room` images."""

    def __init__(self, function, room: int) -> None:
        self.function, self.room, self.sizes = function, room, []

    def __call__(self, x, *arguments, **options):
        self.sizes.append(len(x))
        if len(x) > self.room:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return self.function(x, *arguments, **options)


@pytest.fixture
def images():
    return torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)).double()


def test_chains_are_halved_until_they_fit_and_nothing_else_changes(
    langevin_defense, images, caplog, monkeypatch
):
    expected = langevin_defense(replicates=6)(images)
    defense = langevin_defense(replicates=6, max_chains=16)
    small = Small(defense.purifier.purify, room=5)
    monkeypatch.setattr(defense.purifier, "purify", small)
    with caplog.at_level(logging.WARNING, "ebm_defense"):
        found = defense(images)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert defense.max_chains == 4
    assert small.sizes == [16, 8, 4, 4, 4, 4, 2]
    assert len(caplog.records) == 2


def test_the_classifier_may_be_what_does_not_fit(langevin_defense, images, monkeypatch):
    expected = langevin_defense()(images)
    defense = langevin_defense()
    small = Small(defense.classifier.forward, room=4)
    monkeypatch.setattr(defense.classifier, "forward", small)
    torch.testing.assert_close(defense(images), expected, rtol=0, atol=1e-12)
    assert defense.max_chains == 3


FULL = [
    torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
    RuntimeError("HIP out of memory. Tried to allocate 2 MiB"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"),
    MemoryError(),
]


@pytest.mark.parametrize("error", FULL)
def test_full_memory_is_known_by_whoever_says_it(error):
    packing, tries = Packing(8), []

    def work():
        tries.append(packing.chains)
        if packing.chains > 2:
            raise error
        return "done"

    assert packing.fitting(work) == "done"
    assert tries == [8, 4, 2]


@pytest.mark.parametrize("error", FULL)
def test_no_engine_takes_full_memory_for_a_reason_to_be_slower(error, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setitem(ENGINES, "convolutional", Engine(lambda *_: True, fail, fail))
    x = torch.zeros(1, 1, 8, 8)
    for ask in (prepare, prepare_product):
        with pytest.raises(type(error)):
            ask(torch.sum, x, "fp32")


def test_where_not_one_chain_fits_the_user_is_told(langevin_defense, images, monkeypatch):
    defense = langevin_defense(max_chains=2)
    monkeypatch.setattr(defense.purifier, "purify", Small(None, room=0))
    with pytest.raises(UsageError, match="does not hold a single chain"):
        defense(images)


def test_other_errors_are_not_swallowed():
    def fail():
        raise RuntimeError("something else")

    packing = Packing(8)
    with pytest.raises(RuntimeError, match="something else"):
        packing.fitting(fail)
    assert packing.chains == 8


def test_a_gpu_is_aimed_at_the_chains_that_keep_it_busy_if_they_fit():
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert Packing(None).aim(gpu) == Packing(LARGEST).aim(gpu) == READY
    assert Packing(None).aim(cpu) == USUAL
    assert Packing(37).aim(gpu) == Packing(37).aim(cpu) == 37


def test_none_is_measured_on_a_gpu_and_the_usual_on_a_cpu(langevin_defense, images):
    defense = langevin_defense(max_chains=None)
    assert isinstance(defense, PurifiedClassifier)
    torch.testing.assert_close(defense(images), langevin_defense()(images))
    assert defense.max_chains == 400


@pytest.mark.parametrize(
    ("free", "each", "chains"),
    [(2**30, 2**20, 512), (3 * 2**30, 2**20, 1024), (5, 9, 1), (2**50, 1, 16_384)],
)
def test_half_of_the_free_memory_is_filled_with_a_power_of_two(free, each, chains):
    assert chains_in(free, each) == chains
