"""The fused kernels are torch's operations; run on a GPU, or anywhere with TRITON_INTERPRET=1."""

from __future__ import annotations

import os

import pytest
import torch

from ebm_defense.engine import triton_kernels
from ebm_defense.noise import KeyedNoise

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_triton = pytest.mark.skipif(
    triton_kernels.triton is None or not (INTERPRETED or torch.cuda.is_available()),
    reason="needs Triton, and a GPU or TRITON_INTERPRET=1",
)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def test_without_a_gpu_or_triton_the_kernels_are_not_used():
    assert not triton_kernels.works(torch.device("cpu"))


@needs_triton
def test_both_kernels_agree_with_torch():
    assert triton_kernels.agrees_with_torch(DEVICE)


@needs_triton
@pytest.mark.parametrize("shape", [(1, 1, 3, 3), (3, 1, 28, 28), (2, 3, 33, 33)])
def test_the_fused_update_feels_the_keyed_noise(shape):
    noise = KeyedNoise(torch.arange(shape[0], device=DEVICE) * 1_000_003 - 5)
    x = torch.zeros(shape, device=DEVICE)
    number = torch.tensor([40], device=DEVICE)
    triton_kernels.move_(x, torch.zeros_like(x), noise.keys, number, 1, 1.0, 1.0)
    torch.testing.assert_close(x, noise.normal(41, x), rtol=0, atol=1e-5)
