"""Precisions by name, and what they mean on a device."""

from __future__ import annotations

import logging
from functools import cache
from pathlib import Path

import torch

from ebm_defense.errors import UsageError

PRECISIONS = ("fp32", "tf32", "bf16", "fastest")


def resolve_precision(precision: str, device: torch.device, dtype: torch.dtype) -> str:
    """Return what a precision means here: "fp32", "tf32", "bf16", or "fp64" for float64 images.

    "fastest" is what the processor multiplies natively, whether or not chains in it purify as fp32
    ones do; a purifier's "auto" asks `precision.chains.allowed_precision`. Only the energy's inner
    activations lose digits; state, noise and update keep `dtype`. float64 always wins, and what a
    GPU lacks is fp32, said once; CPUs compute "tf32" in fp32.

    Raises:
        UsageError: an unknown precision.
    """
    if precision not in PRECISIONS and (precision, dtype) != ("fp64", torch.float64):
        raise UsageError(f"precision is {precision!r}; choose one of {', '.join(PRECISIONS)}.")
    if dtype == torch.float64:
        return "fp64"
    if precision == "fastest":
        return "bf16" if _has_bf16(device) else "fp32"
    if precision == "tf32" and not _has_tf32(device):
        return "fp32"
    if precision == "bf16" and device.type == "cuda" and not _has_bf16(device):
        _say_once(f"{torch.cuda.get_device_name(device)} has no bf16; its chains run in fp32.")
        return "fp32"
    return precision


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return _cpu_has_bf16()


@cache
def _cpu_has_bf16() -> bool:
    asked = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # since torch 2.6
    if asked is not None:
        return bool(asked())
    try:
        return "avx512_bf16" in Path("/proc/cpuinfo").read_text(encoding="ascii")
    except OSError:
        return False


def _has_tf32(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


@cache
def _say_once(message: str) -> None:
    logging.getLogger("ebm_defense").warning(message)
