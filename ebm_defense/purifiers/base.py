"""What a purifier is, and all that it says of itself."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar, Self, get_type_hints

import torch
from torch import Tensor, nn

from ebm_defense.engine import Curvature
from ebm_defense.errors import UsageError
from ebm_defense.interface.images import PROBED, check_images
from ebm_defense.interface.inputs import as_images
from ebm_defense.interface.modes import in_eval_mode, modules_of
from ebm_defense.noise import GeneratorNoise, Noise, fresh_seed, working_dtype
from ebm_defense.purifiers.state import State, state_vjp

Plain = int | float | str | bool
Classify = Callable[[Tensor], Tensor]
PreparedVjp = Callable[[State, State, Curvature | None], State]
"""Maps a cotangent after a step, the state before it, and the curvature lent to corners (None for
their own) to the cotangent before it."""


class _StraightThrough(torch.autograd.Function):
    """The purified image forward, the identity backward: BPDA (Athalye, Carlini, Wagner 2018)."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, purified: Tensor) -> Tensor:
        return purified.view_as(purified)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def straight_through(images: Tensor, purified: Tensor) -> Tensor:
    """Return purified images whose gradient is carried to the images as it is (BPDA)."""
    result: Tensor = _StraightThrough.apply(images, purified)
    return result


class Purifier(nn.Module):
    """A map of images to images; calling one lets gradients through as the identity (BPDA).

    A new purifier overrides `purify`, and of the rest what is not true of it; nothing elsewhere
    asks what kind it is. Its constructor's arguments are its settings, each kept as an attribute of
    the same name: plain ones are its numbers, modules its networks. An entry in `PURIFIERS` gives
    it a name, by which defense folders, commands and tables know it.

    Attributes:
        caption: its description in one line, with what `record` returns filled in.
        stochastic: whether two calls differ; if not, one replicate says all.
        identity: whether it leaves images as they are, so that there is nothing to undefend.
        chain_steps: Langevin steps, or others as dear, that an image costs.
        differentiable: whether torch can differentiate `purify` as a whole; a long chain is better
            a `SteppedPurifier`.
        options: arguments that say how to compute and not what, which no folder keeps.
    """

    caption: ClassVar[str] = ""
    stochastic: bool = True
    identity: ClassVar[bool] = False
    chain_steps: int = 0
    differentiable: bool = False
    options: ClassVar[tuple[str, ...]] = ()

    def purify(self, images: Tensor, noise: Noise) -> Tensor:
        """Purify `[b, C, H, W]` images, in float32 or float64 and without a gradient."""
        raise NotImplementedError

    def forward(
        self,
        images: Tensor,
        generator: torch.Generator | None = None,
        *,
        noise: Noise | None = None,
    ) -> Tensor:
        """Purify images.

        Args:
            images: `[N, C, H, W]` float in [0, 1].
            generator: where the noise comes from; fresh noise when neither it nor `noise` is given.
            noise: a noise stream, instead of a generator.

        Returns:
            `[N, C, H, W]` on the same scale, not clamped.

        Raises:
            UsageError: no float images `[N, C, H, W]`, NaN pixels, or pixels far outside [0, 1].
        """
        images = as_images(images)
        check_images(images, slack=PROBED)
        if noise is None:
            generator = generator or torch.Generator().manual_seed(fresh_seed())
            noise = GeneratorNoise(generator)
        with in_eval_mode(modules_of(self)):
            purified = self.purify(self.prepared(images.detach()), noise)
        return straight_through(images, purified.to(images.dtype))

    def prepared(self, images: Tensor) -> Tensor:
        """Return images as `purify` wants them: half precision in float32."""
        return images.to(working_dtype(images.dtype))

    def probe_vjp(self, images: Tensor, noise: Noise) -> None:
        """Go back through one step at images such as these, if gradients through the purifier do:
        the memory that it takes is measured.
        """

    @classmethod
    def arguments(cls) -> dict[str, Any]:
        """Return its constructor's arguments, those in `options` aside, with their types."""
        found, hints = inspect.signature(cls).parameters.values(), get_type_hints(cls.__init__)
        named = [p.name for p in found if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        return {name: hints.get(name, Any) for name in named if name not in cls.options}

    @classmethod
    def needed(cls) -> list[str]:
        """Return the names of the arguments that have no default."""
        found = inspect.signature(cls).parameters
        return [name for name in cls.arguments() if found[name].default is inspect.Parameter.empty]

    @classmethod
    def opened(cls, place: str, **settings: Any) -> Purifier:
        """Make one from what stands behind its name on a command line, as in diffusion:FOLDER.

        Args:
            place: a folder or file of networks.
            **settings: its own, or of how to read them, where the defaults will not do.

        Raises:
            UsageError: nothing that it can be made of.
        """
        raise UsageError(
            f"there is no defense {place!r}; a {cls.__name__} is read from a defense folder."
        )

    @property
    def numbers(self) -> dict[str, Plain]:
        """Its settings, as plain values for TOML."""
        kept = {name: getattr(self, name, None) for name in self.arguments()}
        return {name: v for name, v in kept.items() if isinstance(v, Plain)}

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The networks that it is made of, by the names of its arguments."""
        kept = {name: getattr(self, name, None) for name in self.arguments()}
        return {name: v for name, v in kept.items() if isinstance(v, nn.Module)}

    def record(self, images: Tensor) -> dict[str, Any]:
        """Return what a run keeps of it: its class, its numbers, and what it chose for images."""
        plain = {k: v for k, v in vars(self).items() if isinstance(v, Plain)}
        return {"kind": type(self).__name__} | {k: v for k, v in plain.items() if k != "training"}

    @classmethod
    def described(cls, record: Mapping[str, Any]) -> str:
        """Return in one line what one is of which a run kept this record.

        Raises:
            KeyError: a record of another version, which lacks what the line says.
        """
        return cls.caption.format(**record)

    @property
    def image_shape(self) -> tuple[int, int, int] | None:
        """The only shape `[C, H, W]` of images that it takes, if it is that particular."""
        return None

    def curvature(self, images: Tensor, direction: Tensor) -> Tensor | None:
        """Return ∇²U·direction at images `[b, C, H, W]`; None where it has no energy U."""
        return None

    def remarks(self, images: Tensor, noise: Noise) -> list[str]:
        """Return sentences on how images `[b, C, H, W]` in [0, 1] fare on their way; most say none.

        Args:
            images: a few; they are purified once more.
            noise: of their chains.
        """
        return []

    def gradients(self, images: Tensor) -> tuple[str, ...]:
        """Return the gradients that fit it, by their names in `GRADIENTS`, the strongest first.

        Args:
            images: `[b, C, H, W]` in [0, 1], of those to be attacked; one is enough.
        """
        return ("full", "bpda") if self.differentiable else ("bpda",)

    def compare_precisions(
        self, images: Tensor, classify: Classify, labels: Tensor
    ) -> dict[str, tuple[str, Any]]:
        """Compare faster precisions with fp32 from images `[n, C, H, W]` of classes `[n]`.

        Returns:
            By precision what was found, after its key in `precision.findings`; nothing where
            another precision would change nothing.
        """
        return {}

    def shortened(self, steps: int) -> Purifier:
        """Return one of fewer steps that goes as far, through which an attack is cheaper.

        Raises:
            UsageError: it has no such relative, or takes fewer steps itself.
        """
        if self.differentiable:
            return self  # torch differentiates it as it is: it is as cheap as it can be
        raise UsageError(
            f"a surrogate shortens a chain, such as a LangevinPurifier's, not a "
            f"{type(self).__name__}'s."
        )

    def tiled(self) -> Purifier:
        """Return one for larger images than it knows, which works on tiles that overlap.

        Raises:
            UsageError: it has no energy that could be laid out in tiles.
        """
        raise UsageError(
            f"only a chain on an energy can work on tiles, not a {type(self).__name__}; shrink the "
            "images to its own size."
        )

    def brief(self, images: Tensor) -> Purifier:
        """Return one that stops as soon as it can and looks nothing up first, to be tried out.

        Args:
            images: `[b, C, H, W]` in [0, 1], of those that it will purify; one is enough.
        """
        return self

    def on_the_way(self, images: Tensor, noise: Noise, steps: Collection[int]) -> dict[int, Tensor]:
        """Return the images `[b, C, H, W]` after each of these numbers of steps, by the number; of
        a purifier without steps, only as they end.
        """
        return {self.chain_steps: self.purify(images, noise)}


class SteppedPurifier(Purifier):
    """A purifier made of `chain_steps` steps, through which one can go back a step at a time.

    What goes from step to step is its state: a tensor, or tensors by name, with a batch axis first,
    of whatever shape. A new one overrides `advance`, `enter` and `leave` where states are no
    images, and `vjp_step` where torch cannot differentiate `advance`.
    """

    def enter(self, images: Tensor) -> State:
        """Return the state x_0 at images `[b, C, H, W]`."""
        return images

    def leave(self, x: State) -> Tensor:
        """Return the purified images at the last state."""
        purified: Tensor = x
        return purified

    def advance(self, x: State, noise: Noise, steps: range) -> State:
        """Return the state after these consecutive steps, from the state before them."""
        raise NotImplementedError

    def states(self, x: State, noise: Noise, blocks: Sequence[range]) -> list[State]:
        """Return the state x before consecutive blocks of steps, and the state after each."""
        found = [x]
        for block in blocks:
            found.append(self.advance(found[-1], noise, block))
        return found

    def vjp_step(self, cotangent: State, x: State, noise: Noise, step: int) -> State:
        """Return cotangentᵀ·∂x_{step+1}/∂x_step at the state x before that step."""
        return state_vjp(lambda x: self.advance(x, noise, range(step, step + 1)), x, cotangent)

    def prepared_vjp(self, x: State, precision: str) -> PreparedVjp | None:
        """Return what computes `vjp_step` faster at the states of a chain such as x, if anything.

        Args:
            x: one of the chain's states.
            precision: of its products, "fp32" or "bf16".
        """
        return None

    def refuse_more(self, steps: int) -> None:
        """Refuse a surrogate of more steps than its own."""
        if steps > self.chain_steps:
            raise UsageError(
                f"the surrogate's {steps} steps are more than the defense's {self.chain_steps}; "
                "give it fewer."
            )

    def remade(self, **changes: Plain) -> Self:
        """Return one of the same networks with other settings."""
        made: dict[str, Any] = self.networks | self.numbers | changes
        return type(self)(**made)

    def purify(self, images: Tensor, noise: Noise) -> Tensor:
        return self.leave(self.advance(self.enter(images), noise, range(self.chain_steps)))

    def gradients(self, images: Tensor) -> tuple[str, ...]:
        return ("full", "bpda")

    def on_the_way(self, images: Tensor, noise: Noise, steps: Collection[int]) -> dict[int, Tensor]:
        x, done, seen = self.enter(images), 0, {}
        for step in sorted(steps):
            x, done = self.advance(x, noise, range(done, step)), step
            seen[step] = self.leave(x)
        return seen
