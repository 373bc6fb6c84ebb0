"""The fused kernels are torch's operations, and they compile for GPUs that nobody has here.

Triton compiles for any GPU on a CPU, and its interpreter runs kernels on one; both need the extra
`triton` alone. On a machine with a GPU they run there too.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ebm_defense.energies.conv import SoftLeakyReLU
from ebm_defense.engine import triton_kernels
from ebm_defense.noise import KeyedNoise

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
installed = pytest.mark.skipif(
    triton_kernels.triton is None, reason="Triton is not installed (pip install '.[triton]')"
)
runs = pytest.mark.skipif(
    triton_kernels.triton is None or not (INTERPRETED or torch.cuda.is_available()),
    reason="needs Triton, and a GPU or TRITON_INTERPRET=1",
)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}
TYPES = {"fp32": "*fp32", "bf16": "*bf16"}


def signatures(maps: str, big: bool) -> dict[str, dict[str, str]]:
    """Return the kernels' arguments: maps in fp32 or bf16, of more than 2³¹ numbers or of fewer."""
    count = "i64" if big else "i32"
    return {
        "_bias_leaky": {
            "z": maps, "bias": maps, "count": count, "channels": "i32", "slope": "fp32",
        },
        "_soft_leaky": {"z": maps, "slope": maps, "count": count, "a": "fp32", "e": "fp32"},
        "_move": {
            "x": "*fp32", "gradient": maps, "keys": "*i64", "number": "*i64", "ahead": "i32",
            "size": "i32", "drift": "fp32", "step_size": "fp32",
        },
    }  # fmt: skip


@installed
@pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled")
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("maps", TYPES)
@pytest.mark.parametrize("kernel", signatures("*fp32", False))
def test_each_kernel_compiles_for_gpus_that_are_not_here(kernel, maps, target, tmp_path):
    triton = pytest.importorskip("triton", minversion="3.2")  # whose compiler is called otherwise
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    for big in (False, True):
        signature = signatures(TYPES[maps], big)[kernel] | {"block": "constexpr"}
        source = ASTSource(
            fn=getattr(triton_kernels, kernel),
            signature=signature,
            constexprs={(len(signature) - 1,): triton_kernels.BLOCK},
        )
        made = triton.compile(source, target=GPUTarget(*TARGETS[target])).asm
        assert len(made.get("cubin") or made["hsaco"]) > 1000


@installed
@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="the kernels run here anyway")
def test_the_interpreter_finds_the_kernels_to_be_torchs_operations():
    """Run the rest of this file in a process that is told at its start to interpret kernels."""
    here = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    here["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__))]
    done = subprocess.run(words, env=here, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "passed" in done.stdout


def test_without_a_gpu_or_triton_the_kernels_are_not_used():
    assert not triton_kernels.works(torch.device("cpu"))


@runs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 5, 7), (3, 16, 9, 9)])
def test_the_fused_smooth_bend_and_its_slope_are_torchs(shape, dtype):
    z = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    a, e = 0.475, 0.01
    exact = z.double().requires_grad_()
    value = SoftLeakyReLU(slope=1 - 2 * a, width=e)(exact)
    (slope,) = torch.autograd.grad(value.sum(), exact)
    given = z.clone().contiguous(memory_format=torch.channels_last)
    tolerance = 1e-6 if dtype == torch.float32 else 2**-7  # as above
    for found, true in zip(triton_kernels.soft_leaky_(given, a, e), (value, slope), strict=True):
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), true, rtol=tolerance, atol=1e-6)


@runs
def test_all_kernels_agree_with_torch():
    assert triton_kernels.agrees_with_torch(DEVICE)


@runs
@pytest.mark.parametrize("shape", [(1, 1, 3, 3), (3, 1, 28, 28), (2, 3, 33, 33)])
@pytest.mark.parametrize("ahead", [0, 1, 17])
def test_the_fused_update_feels_the_keyed_noise(shape, ahead):
    noise = KeyedNoise(torch.arange(shape[0], device=DEVICE) * 1_000_003 - 5)
    x = torch.zeros(shape, device=DEVICE)
    number = torch.tensor([41 - ahead], device=DEVICE)
    triton_kernels.move_(x, torch.zeros_like(x), noise.keys, number, ahead, 1.0, 1.0)
    torch.testing.assert_close(x, noise.normal(41, x), rtol=0, atol=1e-5)


@runs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 5, 7), (3, 16, 9, 9)])
def test_the_fused_bend_is_torchs(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    z, bias = torch.randn(shape, generator=generator), torch.randn(shape[1], generator=generator)
    z, bias = z.to(DEVICE, dtype), bias.to(DEVICE, dtype)
    exact = z.float() + bias.float()[:, None, None]
    exact = torch.nn.functional.leaky_relu(exact, 0.05)
    given = z.contiguous(memory_format=torch.channels_last)
    found = triton_kernels.bias_leaky_(given, bias, 0.05)
    # The interpreter cuts the digits that bf16 lacks off, twice the error of rounding them.
    tolerance = 1e-6 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(found.float(), exact, rtol=tolerance, atol=1e-6)


@runs
def test_a_gradient_in_bf16_moves_as_its_numbers_in_fp32():
    x, gradient = torch.randn(2, 2, 3, 5, 5, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    rough, number = gradient.bfloat16(), torch.tensor([3], device=DEVICE)
    moved = [x.clone(), x.clone()]
    keys = torch.tensor([5, -9], device=DEVICE)
    for start, slope in zip(moved, (rough, rough.float()), strict=True):
        triton_kernels.move_(start, slope, keys, number, 0, 0.5, 0.1)
    assert torch.equal(*moved)
