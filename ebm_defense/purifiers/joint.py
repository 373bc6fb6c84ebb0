"""Langevin chains over several tensors at once: latents, residuals, the image that is explained."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ebm_defense.engine.autograd import AutogradGradient
from ebm_defense.engine.derivatives import hessian_products
from ebm_defense.engine.widened import widened
from ebm_defense.errors import UsageError
from ebm_defense.interface.numbers import real, whole
from ebm_defense.langevin import Move, State, langevin_step
from ebm_defense.noise import Noise, ahead, drawn_at
from ebm_defense.purifiers.base import Plain, SteppedPurifier
from ebm_defense.purifiers.state import rebuilt, tensors

Joint = dict[str, Tensor]
"""Tensors by name, each with a batch axis first: z, and what else a purifier's chain is of."""

KINDS: dict[type, Callable[[Any, str], float]] = {int: whole, float: real}


class JointPurifier(SteppedPurifier):
    """A Langevin chain over a joint state of named tensors, of the density exp(−V).

    Each step moves those that have a step size s in turn, v ← v − (s²/2)·∂V/∂v + s·noise, each at
    where the others are by then; those without one are held. A new one overrides `enter`, `leave`
    and `potential`.

    Attributes:
        steps: K ≥ 0.
    """

    steps: int

    def potential(self, state: Joint) -> Tensor:
        """Return V, `[b]`."""
        raise NotImplementedError

    def step_sizes(self) -> dict[str, float]:
        """Return the step size of each tensor that moves, in the order in which they do."""
        raise NotImplementedError

    def net(self, name: str, like: Tensor) -> nn.Module:
        """Return one of its networks, in the dtype of what it is given."""
        network: nn.Module = getattr(self, name)
        weight = next(network.parameters(), like)
        wide = network if weight.dtype == like.dtype else widened(network, like)
        assert isinstance(wide, nn.Module)
        return wide

    def check(self, **others: float) -> None:
        """Make plain numbers of its settings, and refuse those out of range.

        Args:
            **others: settings by name, besides the step sizes, that must be above 0.
        """
        for name, kind in self.arguments().items():
            if kind in KINDS:
                setattr(self, name, KINDS[kind](getattr(self, name), name))
        if self.steps < 0:
            raise UsageError(f"Langevin steps must be 0 or more, not {self.steps}.")
        for name, value in (self.step_sizes() | others).items():
            if not 0 < value < math.inf:
                what = f"the step size of {name}" if name in self.step_sizes() else name
                raise UsageError(f"{what} must be above 0, not {value}.")

    @property
    def chain_steps(self) -> int:  # type: ignore[override]
        return self.steps

    @property
    def image_shape(self) -> tuple[int, int, int] | None:
        shapes = (getattr(network, "settings", None) for network in self.networks.values())
        shape: Any = next((s for s in shapes if hasattr(s, "image_size")), None)
        return None if shape is None else (shape.channels, shape.image_size, shape.image_size)

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

    def probe_vjp(self, images: Tensor, noise: Noise) -> None:
        x = self.enter(images)
        self.vjp_step(x, x, noise, 0)

    def shortened(self, steps: int) -> JointPurifier:
        """Return the chain of fewer, larger steps of the same total time Σs².

        Raises:
            UsageError: it takes fewer steps itself.
        """
        if steps > self.steps:
            raise UsageError(
                f"the surrogate's {steps} steps are more than the defense's {self.steps}; give it "
                "fewer."
            )
        longer = math.sqrt(self.steps / steps)
        sizes = {k: v for k, v in self.numbers.items() if k.endswith("step_size")}
        return self._with(steps=steps, **{k: longer * float(v) for k, v in sizes.items()})

    def brief(self, images: Tensor) -> JointPurifier:
        """Return the chain's first step."""
        return self._with(steps=min(1, self.steps))

    def _with(self, **changes: Plain) -> JointPurifier:
        made: dict[str, Any] = self.networks | self.numbers | changes
        return type(self)(**made)


def to_unit(x: Tensor) -> Tensor:
    """Return images of [-1, 1] on the scale [0, 1]."""
    return (x + 1.0) / 2.0


def from_unit(images: Tensor) -> Tensor:
    """Return images of [0, 1] on the scale [-1, 1]."""
    return images * 2.0 - 1.0


def half_square(z: Tensor) -> Tensor:
    """Return ‖z‖²/2 of each row, `[b]`: −log N(z; 0, I) but for a constant."""
    return z.flatten(1).square().sum(1) / 2.0
