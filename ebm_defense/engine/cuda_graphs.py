"""Whole segments of a chain as one CUDA graph: no launch gaps, and the host never waits.

At the published 150 chains a GPU step is bound by the launches of its forty kernels, which a graph
replaces by one. Anything that cannot be captured is run step by step instead.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ebm_defense.engine import triton_kernels
from ebm_defense.engine.base import EnergyGradient
from ebm_defense.engine.report import fell_back
from ebm_defense.noise import KeyedNoise, Noise

SEGMENT, WARM_UP = 20, 3


class Move(NamedTuple):
    """The Langevin update of a state in place: x ← x − drift·∇U + step_size·z."""

    drift: float
    step_size: float

    def __call__(self, x: Tensor, gradient: Tensor, z: Tensor) -> None:
        """Move x `[b, C, H, W]`."""
        x.sub_(gradient, alpha=self.drift).add_(z, alpha=self.step_size)


def run_graphed(x: Tensor, noise: Noise, steps: range, gradient: EnergyGradient, move: Move) -> int:
    """Take as many of `steps` on x, in place, as whole graphs hold; return how many were taken.

    None on a CPU, with noise that is no function of the step, for short chains, or where capture
    fails, which leaves x as it was and is said once.
    """
    keyed = isinstance(noise, KeyedNoise) and noise.keys.device == x.device
    if x.device.type != "cuda" or not keyed or len(steps) < 2 * SEGMENT or not len(x):
        return 0
    assert isinstance(noise, KeyedNoise)
    start = x.clone()
    try:
        with torch.cuda.device(x.device):
            return _replay(x, noise, steps, gradient, move)
    except RuntimeError as error:
        x.copy_(start)
        fell_back("CUDA graphs", type(gradient).__name__, str(error).partition("\n")[0])
        return 0


def _replay(
    x: Tensor, noise: KeyedNoise, steps: range, gradient: EnergyGradient, move: Move
) -> int:
    start, number = x.clone(), torch.tensor([steps.start], device=x.device)

    fuses = x.dtype == torch.float32 and x.is_contiguous() and triton_kernels.works(x.device)

    def segment(count: int) -> None:
        for _ in range(count):
            if fuses:
                triton_kernels.move_(x, gradient(x), noise.keys, number, *move)
            else:
                move(x, gradient(x), noise.normals(number, x)[0])
            number.add_(1)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        segment(WARM_UP)  # libraries choose their kernels here, which a capture forbids
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        segment(SEGMENT)
    x.copy_(start)
    number.fill_(steps.start)
    for _ in range(len(steps) // SEGMENT):
        graph.replay()
    return len(steps) // SEGMENT * SEGMENT
