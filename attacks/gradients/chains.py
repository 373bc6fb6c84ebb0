"""A stepped purifier's chain, run once and differentiated block by block."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ebm_defense.errors import UsageError
from ebm_defense.noise import Noise
from ebm_defense.purifiers.base import SteppedPurifier
from ebm_defense.purifiers.state import State, distance, equal, state_vjp

BlockVjp = Callable[[State, State, range], State]
"""Maps a cotangent after a block of steps, and the state before it, to the cotangent there."""


def groups_of(steps: int, stride: int, stored: int) -> list[list[range]]:
    """Split steps into blocks of `stride`, and blocks into `stored` groups or a few fewer."""
    blocks = [range(k, min(k + stride, steps)) for k in range(0, steps, stride)]
    size = math.ceil(len(blocks) / max(stored, 1))
    return [blocks[i : i + size] for i in range(0, len(blocks), max(size, 1))]


@dataclass(frozen=True, kw_only=True)
class Chain:
    """One batch of chains: the states kept of them, and how to compute the others again.

    Attributes:
        purifier: whose chains they are.
        noise: their noise.
        images: where they started, `[b, C, H, W]`.
        groups: the blocks of steps; a state is kept at the start of each group.
        kept: those states.
        end: the last state.
    """

    purifier: SteppedPurifier
    noise: Noise
    images: Tensor
    groups: list[list[range]]
    kept: list[State]
    end: State

    @property
    def purified(self) -> Tensor:
        """The purified images `[b, C, H, W]`."""
        return self.purifier.leave(self.end)

    def vjp(self, cotangent: Tensor, back: BlockVjp, tolerance: float = 0.0) -> Tensor:
        """Map a cotangent at the purified images to one at the images, both `[b, C, H, W]`.

        Args:
            cotangent: at the purified images.
            back: goes back through one block.
            tolerance: how far a state computed again may lie from the one kept.

        Raises:
            UsageError: it lies further away; the purifier is no function of image and noise.
        """
        g: State = state_vjp(self.purifier.leave, self.end, cotangent)
        after = self.end
        for group, start in reversed(list(zip(self.groups, self.kept, strict=True))):
            # A single block needs no state but its start; one chain's end is replayed all the same.
            replays = len(group) > 1 or after is self.end
            states = self.purifier.states(start, self.noise, group) if replays else [start]
            if replays:
                refuse_mismatch(states.pop(), after, f" at step {group[-1].stop}", tolerance)
            for block, x in reversed(list(zip(group, states, strict=True))):
                g = back(g, x, block)
            after = start
        found: Tensor = state_vjp(self.purifier.enter, self.images, g)
        return found


def run(
    purifier: SteppedPurifier, images: Tensor, noise: Noise, groups: list[list[range]]
) -> Chain:
    """Run the purifier's own chain from images `[b, C, H, W]`, keeping each group's first state."""
    spans = [range(group[0].start, group[-1].stop) for group in groups]
    *kept, end = purifier.states(purifier.enter(images), noise, spans)
    return Chain(purifier=purifier, noise=noise, images=images, groups=groups, kept=kept, end=end)


def refuse_mismatch(replayed: State, stored: State, where: str, tolerance: float) -> None:
    """Refuse a purifier whose second run differs from its first by more than the tolerance."""
    # A chain that diverged has no other gradient than NaN, and is no mismatch.
    if equal(replayed, stored):
        return
    worst = distance(replayed, stored)
    if not worst <= tolerance:
        raise UsageError(
            f"replay mismatch: computed again, the purifier differs by {worst:.2g}{where}, so its "
            "gradient would be of another run; make it a function of its input and noise alone "
            "(no dropout, no state), or allow this device's rounding with replay_tolerance."
        )
