"""The exact gradient through every step of a purifier."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ebm_defense.attacks.gradients.base import Purified, VjpGradient
from ebm_defense.attacks.gradients.chains import Chain, groups_of, refuse_mismatch, run
from ebm_defense.attacks.gradients.curvature import LentCurvature
from ebm_defense.defense import PurifiedClassifier
from ebm_defense.engine.derivatives import PRODUCT_PRECISIONS, arithmetic, vjp
from ebm_defense.errors import UsageError
from ebm_defense.interface.numbers import plain_numbers
from ebm_defense.noise import KeyedNoise, working_dtype
from ebm_defense.purifiers.base import Purifier, SteppedPurifier
from ebm_defense.purifiers.state import State, lerp, size, tensors

PRODUCT_COST = 2.5
"""Chain-steps that a Hessian-vector product costs in the chain's own precision, as measured by
benchmarks/full_gradient.py; by counting convolutions it is 2, four passes to a step's two."""

StepVjp = Callable[[State, State, int], State]
"""Maps a cotangent after a step, and the state before it, to the cotangent there."""

STORES: dict[str, Callable[[int, float, float], int]] = {
    "all": lambda blocks, size, memory: blocks,
    "checkpoints": lambda blocks, size, memory: math.isqrt(blocks),
    "auto": lambda blocks, size, memory: blocks if blocks * size <= memory else math.isqrt(blocks),
}
"""How many of a chain's states to keep, given their number, all chains' bytes a state, and bytes
allowed."""


@dataclass(frozen=True, kw_only=True)
class ChainGradient(VjpGradient):
    """What the gradients that go back through a purifier's steps have in common.

    Attributes:
        store: "all" states of the chains, "checkpoints" (the square root of that many, and the
            rest computed again), or "auto": all if they fit into `memory`.
        memory: GiB that "auto" may fill with states, above 0.
        precision: of the Hessian-vector products, "fp32" or "bf16"; float64 images keep float64.
        replay_tolerance: how far a state computed again may lie from the one kept, ≥ 0.
    """

    store: str = "auto"
    memory: float = 4.0
    precision: str = "fp32"
    replay_tolerance: float = 0.0

    def __post_init__(self) -> None:
        plain_numbers(self)
        if self.store not in STORES:
            raise UsageError(f"store is {self.store!r}; choose one of {', '.join(STORES)}.")
        if self.precision not in PRODUCT_PRECISIONS:
            names = ", ".join(PRODUCT_PRECISIONS)
            raise UsageError(f"a product's precision is {names}, not {self.precision!r}.")
        if not (self.memory > 0 and self.replay_tolerance >= 0):
            raise UsageError(
                "memory must be above 0 and replay_tolerance 0 or more, not "
                f"{self.memory} and {self.replay_tolerance}."
            )

    @property
    def spacing(self) -> int:
        """How many steps one Hessian-vector product stands for."""
        return 1

    def lent_curvature(self, step: int, steps: int) -> LentCurvature | None:
        """Return what lends corners curvature on the way back through one of the chain's steps."""
        return None

    def purify(self, defense: PurifiedClassifier, images: Tensor, keys: Tensor) -> Purified:
        """Purify `images` `[b, C, H, W]` with the noise of `keys` `[r, b]`.

        Raises:
            UsageError: the purifier has no gradient; or, on the way back, a replay mismatch.
        """
        refuse_without_gradient(defense.purifier)
        start = images.detach().to(working_dtype(images.dtype))
        keys = keys.to(start.device)
        defense.measure_chains(start, keys)
        chunks = defense.chunks(keys)
        with torch.no_grad():
            held = keys.numel() * _state_size(defense.purifier, start)
            parts = [
                self.differentiate(defense.purifier, start[rows], KeyedNoise(k), held)
                for rows, k in chunks
            ]

        def step_vjp(cotangent: Tensor) -> Tensor:
            flat = cotangent.flatten(0, 1)
            pairs = zip(parts, flat.split([len(rows) for rows, _ in chunks]), strict=True)
            return torch.cat([flat[:0], *(p.vjp(c) for p, c in pairs)]).view_as(cotangent)

        flat = torch.cat([start[:0], *(p.images for p in parts)]).to(images.dtype)
        return Purified(flat.view(*keys.shape, *images.shape[1:]), step_vjp)

    def differentiate(
        self, purifier: Purifier, images: Tensor, noise: KeyedNoise, held: float
    ) -> Purified:
        """Purify one chunk `[b, C, H, W]`, each image by its own noise.

        Args:
            purifier: one that has a gradient.
            images: where the chains start.
            noise: of the chains.
            held: bytes that one state of all chunks takes.
        """
        if not isinstance(purifier, SteppedPurifier):
            return differentiated_whole(purifier, images, noise, self.replay_tolerance)
        blocks = math.ceil(purifier.chain_steps / self.spacing)
        stored = STORES[self.store](blocks, held, self.memory * 2**30)
        groups = groups_of(purifier.chain_steps, self.spacing, stored)
        chain = run(purifier, images, noise, groups)
        return Purified(chain.purified, lambda cotangent: self._vjp(chain, noise, cotangent))

    def _vjp(self, chain: Chain, noise: KeyedNoise, cotangent: Tensor) -> Tensor:
        with torch.no_grad():
            step_vjp = self.vjp_step(chain.purifier, noise, chain.end)

            def back(g: State, x: State, block: range) -> State:
                earlier = step_vjp(g, x, block.start)
                return earlier if len(block) == 1 else lerp(g, earlier, len(block))

            return chain.vjp(cotangent, back, self.replay_tolerance)

    def vjp_step(self, purifier: SteppedPurifier, noise: KeyedNoise, like: State) -> StepVjp:
        """Return the way back through a step at states such as `like`, by the fastest means."""
        prepared = purifier.prepared_vjp(like, self.precision)

        def by_engine(g: State, x: State, step: int) -> State:
            assert prepared is not None
            lent_curvature = self.lent_curvature(step, purifier.chain_steps)
            return prepared(g, x, None if lent_curvature is None else lent_curvature.curvature)

        def by_autograd(g: State, x: State, step: int) -> State:
            lent_curvature = self.lent_curvature(step, purifier.chain_steps)
            with arithmetic(self.precision, tensors(x)[0].device), lent_curvature or nullcontext():
                return purifier.vjp_step(g, x, noise, step)

        return by_engine if prepared else by_autograd

    def chain_steps(self, defense: PurifiedClassifier, replicates: int = 1) -> int:
        """Return the cost of a query of one image by so many replicates, in Langevin steps.

        States computed again cost one chain more; they are counted for "checkpoints" alone, since
        what "auto" keeps depends on the batch.

        Raises:
            UsageError: the purifier has no gradient.
        """
        refuse_without_gradient(defense.purifier)
        steps = defense.purifier.chain_steps
        products = math.ceil(steps / self.spacing)
        runs = 2 if self.store == "checkpoints" else 1
        return replicates * (steps * runs + round(PRODUCT_COST * products))


@dataclass(frozen=True, kw_only=True)
class Full(ChainGradient):
    """The exact gradient through all K steps: g_t = g_{t+1} − (ε²/2T)·∇²U(x_t)·g_{t+1}, one
    Hessian-vector product a step (Du, Hill, Cai 2026, MEFA).

    It holds the states of the chains, K·C·H·W numbers each or √K·C·H·W, and the graph of one step
    of `max_chains` chains. On an energy without curvature (LeakyReLU, ReLU) it is `Identity`,
    only dearer; see `Smoothed`. Purifiers that are no chains need `differentiable`; rounding,
    JPEG, median and total variation have no gradient and are refused.
    """

    name: str = field(default="full", init=False)


def _state_size(purifier: Purifier, images: Tensor) -> int:
    """Return the bytes that the state of one chain takes."""
    return size(purifier.enter(images[:1])) if isinstance(purifier, SteppedPurifier) else 0


def refuse_without_gradient(purifier: Purifier) -> None:
    """Refuse a purifier that nothing can be differentiated through."""
    if not (purifier.differentiable or isinstance(purifier, SteppedPurifier)):
        raise UsageError(
            f"{type(purifier).__name__} has no gradient of its own to attack with; use the "
            "gradient Identity (BPDA), which carries the loss's past it."
        )


def differentiated_whole(
    purifier: Purifier, images: Tensor, noise: KeyedNoise, tolerance: float
) -> Purified:
    """Purify `[b, C, H, W]` by a map that torch differentiates as it is, computed again to go back.

    Raises:
        UsageError: on the way back, if the second pass differs from the first.
    """
    purified = purifier(images, noise=noise).detach()

    def again(x: Tensor) -> Tensor:
        replayed = purifier.purify(x, noise)
        refuse_mismatch(replayed.detach(), purified, "", tolerance)
        return replayed

    return Purified(purified, lambda cotangent: vjp(again, images, cotangent))
