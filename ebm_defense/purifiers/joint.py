"""Langevin chains over several tensors at once: latents, residuals, the image that is explained."""

from __future__ import annotations

import math
from functools import partial
from typing import Self

import torch
from torch import Tensor

from ebm_defense.engine.autograd import AutogradGradient
from ebm_defense.engine.derivatives import hessian_products
from ebm_defense.langevin import Move, State, langevin_step
from ebm_defense.noise import Noise, ahead, drawn_at
from ebm_defense.purifiers.path import Joint, LatentPath
from ebm_defense.purifiers.state import rebuilt, tensors


class JointPurifier(LatentPath):
    """A Langevin chain over a joint state of named tensors, of the density exp(−V).

    Each step moves those that have a step size s in turn, v ← v − (s²/2)·∂V/∂v + s·noise, each at
    where the others are by then; those without one are held. A new one overrides `enter`, `leave`
    and `potential`.
    """

    def potential(self, state: Joint) -> Tensor:
        """Return V, `[b]`."""
        raise NotImplementedError

    def step_sizes(self) -> dict[str, float]:
        """Return the step size of each tensor that moves, in the order in which they do."""
        raise NotImplementedError

    def check(self, **others: float) -> None:
        """Refuse settings out of range, step sizes too; see `LatentPath.check`."""
        sizes = {f"the step size of {name}": size for name, size in self.step_sizes().items()}
        super().check(**(sizes | others))

    def advance(self, x: Joint, noise: Noise, steps: range) -> Joint:
        moved = self._moved(x)
        for z in ahead(drawn_at(moved.device, noise, len(moved)), steps, moved):
            x = self._sweep(x, z)[-1]
        return x

    def vjp_step(self, cotangent: Joint, x: Joint, noise: Noise, step: int) -> Joint:
        moved = self._moved(x)
        states = self._sweep(x, drawn_at(moved.device, noise, len(moved)).normal(step, moved))
        turns = list(zip(self.step_sizes().items(), states, strict=False))
        for (name, size), before in reversed(turns):
            pulled = hessian_products(
                lambda parts, like=before: self.potential(rebuilt(like, parts)),  # type: ignore[misc]
                tensors(before),
                sorted(before).index(name),
                cotangent[name],
            )
            drift = rebuilt(before, pulled)
            cotangent = {k: g - size**2 / 2 * drift[k] for k, g in cotangent.items()}
        return cotangent

    def _moved(self, x: Joint) -> Tensor:
        """Return what moves of a state, `[b, d]`: the noise of a step is of this shape."""
        return torch.cat([x[name].detach().flatten(1) for name in self.step_sizes()], dim=1)

    def _sweep(self, x: Joint, noise: Tensor) -> list[Joint]:
        """Return the state x, and those after each of its tensors has moved by noise `[b, d]`."""
        states, done = [x], 0
        for name, size in self.step_sizes().items():
            before = states[-1]
            part = before[name].detach().clone()
            z = noise[:, done : done + part[0].numel()].view_as(part)
            gradient = AutogradGradient(partial(self._of_one, before, name), "fp32")
            move = partial(Move(size**2 / 2, size).apply, z=z)
            after, _ = langevin_step(State(part), move, gradient)
            states.append(before | {name: after.x})
            done += part[0].numel()
        return states

    def _of_one(self, others: Joint, name: str, part: Tensor) -> Tensor:
        """Return V as a function of one tensor, where the others are."""
        return self.potential(others | {name: part})

    def shortened(self, steps: int) -> Self:
        """Return the chain of fewer, larger steps of the same total time Σs².

        Raises:
            UsageError: it takes fewer steps itself.
        """
        self.refuse_more(steps)
        longer = math.sqrt(self.steps / steps)
        sizes = {k: v for k, v in self.numbers.items() if k.endswith("step_size")}
        return self.remade(steps=steps, **{k: longer * float(v) for k, v in sizes.items()})
