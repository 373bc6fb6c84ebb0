"""Purifiers: images in [0, 1] to images that are about in [0, 1], not clamped."""

from __future__ import annotations

import io
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ebm_defense.engine import Curvature, Energy, prepare_product
from ebm_defense.engine.derivatives import hessian_product, vjp
from ebm_defense.errors import UsageError
from ebm_defense.images import PROBED, check_images
from ebm_defense.inputs import as_images
from ebm_defense.langevin import LangevinSettings, Trace, run_chain
from ebm_defense.modes import in_eval_mode, modules_of
from ebm_defense.noise import GeneratorNoise, KeyedNoise, Noise, fresh_seed, working_dtype
from ebm_defense.precision.chains import checked_precision
from ebm_defense.precision.findings import versions
from ebm_defense.precision.names import PRECISIONS, resolve_precision

PreparedVjp = Callable[[Tensor, Tensor, Curvature | None], Tensor]
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

    A new purifier overrides `purify` and, if it is deterministic, sets `stochastic = False`.

    Attributes:
        stochastic: whether two calls differ; if not, one replicate says all.
        chain_steps: Langevin steps an image costs.
        differentiable: whether torch can differentiate `purify` as a whole; a long chain is better
            a `SteppedPurifier`.
    """

    stochastic: bool = True
    chain_steps: int = 0
    differentiable: bool = False

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


class SteppedPurifier(Purifier):
    """A purifier made of `chain_steps` steps, through which one can go back a step at a time.

    A new one overrides `advance`, and `vjp_step` where torch cannot differentiate `advance`.
    """

    def enter(self, images: Tensor) -> Tensor:
        """Return the state x_0 at images `[b, C, H, W]`."""
        return images

    def leave(self, x: Tensor) -> Tensor:
        """Return the purified images at the last state."""
        return x

    def advance(self, x: Tensor, noise: Noise, steps: range) -> Tensor:
        """Return the state after these consecutive steps, from the state before them."""
        raise NotImplementedError

    def vjp_step(self, cotangent: Tensor, x: Tensor, noise: Noise, step: int) -> Tensor:
        """Return cotangentᵀ·∂x_{step+1}/∂x_step at the state x before that step."""
        return vjp(lambda x: self.advance(x, noise, range(step, step + 1)), x, cotangent)

    def prepared_vjp(self, x: Tensor, precision: str) -> PreparedVjp | None:
        """Return what computes `vjp_step` faster at the states of a chain such as x, if anything.

        Args:
            x: one of the chain's states, `[b, C, H, W]`.
            precision: of its products, "fp32" or "bf16".
        """
        return None

    def purify(self, images: Tensor, noise: Noise) -> Tensor:
        return self.leave(self.advance(self.enter(images), noise, range(self.chain_steps)))


class LangevinPurifier(SteppedPurifier):
    """Long-run Langevin dynamics on an energy (Hill, Mitchell, Zhu 2021, eq. 4).

    Args:
        energy: maps `[N, C, H, W]` in [-1, 1] to `[N]`; any `nn.Module` or function.
        steps: K ≥ 0.
        step_size: ε > 0, in [-1, 1] pixel units.
        temperature: T > 0; the defaults are the published update for CIFAR-10.
        precision: one of `PRECISIONS`, for the energy's inner activations, or "auto": bf16
            where it is fast and chains in it were shown to purify as fp32 ones do, which is
            looked up or checked at the first purification (see `ebm_defense.precision.chains`).
            float64 images always keep float64.

    Raises:
        UsageError: a setting out of range.
    """

    def __init__(
        self,
        energy: Energy,
        steps: int = 1500,
        step_size: float = 0.01,
        temperature: float = 5e-5,
        precision: str = "auto",
    ) -> None:
        super().__init__()
        self.settings = LangevinSettings(steps=steps, step_size=step_size, temperature=temperature)
        allowed = ("auto", *PRECISIONS)
        if precision not in allowed:
            raise UsageError(f"precision is {precision!r}; choose one of {', '.join(allowed)}.")
        self.energy, self.precision = energy, precision
        self._checked: dict[tuple[Any, ...], str] = {}

    @property
    def chain_steps(self) -> int:  # type: ignore[override]
        return self.settings.steps

    def purify(
        self,
        images: Tensor,
        noise: Noise,
        *,
        trace: Trace | None = None,
        snapshots: Collection[int] = (),
    ) -> Tensor:
        """Run the chain from `images`; `trace` and `snapshots` are as in `run_chain`."""
        x = run_chain(
            self.enter(images),
            noise,
            energy=self.energy,
            settings=self.settings,
            precision=self.resolved_precision(images),
            trace=trace,
            snapshots=snapshots,
        )
        return self.leave(x)

    def enter(self, images: Tensor) -> Tensor:
        return images * 2.0 - 1.0

    def leave(self, x: Tensor) -> Tensor:
        return (x + 1.0) / 2.0

    def advance(self, x: Tensor, noise: Noise, steps: range) -> Tensor:
        return run_chain(
            x,
            noise,
            energy=self.energy,
            settings=replace(self.settings, steps=len(steps)),
            precision=self.resolved_precision(x),
            first=steps.start,
        )

    def vjp_step(self, cotangent: Tensor, x: Tensor, noise: Noise, step: int) -> Tensor:
        return cotangent - self.settings.drift * hessian_product(self.energy, x, cotangent)

    def prepared_vjp(self, x: Tensor, precision: str) -> PreparedVjp | None:
        if type(self).vjp_step is not LangevinPurifier.vjp_step:
            return None
        resolved = resolve_precision(precision, x.device, x.dtype)
        product, drift = prepare_product(self.energy, x, resolved), self.settings.drift
        if product is None:
            return None
        return lambda g, x, lent: torch.sub(g, product(x, g, lent), alpha=drift)

    def resolved_precision(self, images: Tensor) -> str:
        """Return the precision that these images would be purified in; see `precision`.

        With "auto" the first call for an energy that nothing is known of takes some seconds.
        """
        if self.precision != "auto":
            return resolve_precision(self.precision, images.device, images.dtype)
        about = (images.device, images.dtype, self.settings, *versions(self.energy))
        if about not in self._checked:
            self._checked = {about: checked_precision(self.energy, images, self.settings)}
        return self._checked[about]

    def extra_repr(self) -> str:
        s = self.settings
        return f"steps={s.steps}, step_size={s.step_size}, temperature={s.temperature}"


class NoPurifier(Purifier):
    """Leaves images as they are: the undefended classifier."""

    stochastic = False
    differentiable = True

    def purify(self, images: Tensor, noise: Noise) -> Tensor:
        return images


class GaussianNoise(Purifier):
    """Adds N(0, std²) noise: the control that any purifier must beat.

    Args:
        std: standard deviation ≥ 0, in [0, 1] pixel units.
    """

    differentiable = True

    def __init__(self, std: float) -> None:
        super().__init__()
        if not 0 <= std < float("inf"):
            raise UsageError(f"the noise's standard deviation must be 0 or more, not {std}.")
        self.std = std

    def purify(self, images: Tensor, noise: Noise) -> Tensor:
        return images + self.std * noise.normal(0, images)


class BitDepth(Purifier):
    """Rounds pixels to 2^bits levels (Xu, Evans, Qi 2018, feature squeezing)."""

    stochastic = False

    def __init__(self, bits: float) -> None:
        super().__init__()
        if not 1 <= bits <= 8 or bits != int(bits):
            raise UsageError(f"bits must be a whole number from 1 to 8, not {bits}.")
        self.levels = 2 ** int(bits) - 1

    def purify(self, images: Tensor, noise: Noise) -> Tensor:
        return (images * self.levels).round() / self.levels


class ArrayPurifier(Purifier):
    """A deterministic filter of one NumPy image `[H, W, C]` in [0, 1] at a time."""

    stochastic = False

    def filter(self, image: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Filter one image `[H, W, C]`."""
        raise NotImplementedError

    def purify(self, images: Tensor, noise: Noise) -> Tensor:
        arrays = images.permute(0, 2, 3, 1).cpu().numpy()
        out = [torch.from_numpy(np.asarray(self.filter(a))) for a in arrays]
        if not out:
            return images
        return torch.stack(out).permute(0, 3, 1, 2).to(images)


class Jpeg(ArrayPurifier):
    """JPEG compression by Pillow (Dziugaite, Ghahramani, Roy 2016), for 1 or 3 channels."""

    def __init__(self, quality: float) -> None:
        super().__init__()
        if not 1 <= quality <= 95:
            raise UsageError(f"JPEG quality must be from 1 to 95, not {quality}.")
        self.quality = int(quality)

    def filter(self, image: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        from PIL import Image

        pixels = (image.clip(0, 1) * 255).round().astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(
            file, "JPEG", quality=self.quality
        )
        decoded = np.asarray(Image.open(file), dtype=np.float32) / 255.0
        return decoded.reshape(image.shape)


class TotalVariation(ArrayPurifier):
    """Total-variation denoising by scikit-image's Chambolle solver (Guo et al. 2018)."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        if not weight > 0:
            raise UsageError(f"the total-variation weight must be above 0, not {weight}.")
        self.weight = weight

    def filter(self, image: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        from skimage.restoration import denoise_tv_chambolle

        return np.asarray(denoise_tv_chambolle(image, weight=self.weight, channel_axis=-1))


class MedianFilter(ArrayPurifier):
    """The median of a size × size window, by SciPy (Xu, Evans, Qi 2018)."""

    def __init__(self, size: float) -> None:
        super().__init__()
        if not 1 <= size < float("inf") or size != int(size):
            raise UsageError(f"the median window must be a whole number from 1, not {size}.")
        self.size = int(size)

    def filter(self, image: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        from scipy.ndimage import median_filter

        return np.asarray(median_filter(image, size=(self.size, self.size, 1)))


class ForeignPurifier(Purifier):
    """Anybody's map of images to images, a diffusion purifier for instance.

    A foreign map draws from torch's global generator; here that generator is forked, seeded from
    the noise stream for the call, and put back as it was. Its noise then depends on the batch too.
    """

    def __init__(self, transform: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.transform = transform

    def prepared(self, images: Tensor) -> Tensor:
        return images  # it knows in which precision it runs

    def purify(self, images: Tensor, noise: Noise) -> Tensor:
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(_seed_from(noise, images))
            purified = self.transform(images.clone())
        if getattr(purified, "shape", None) != images.shape:
            raise UsageError(
                f"a purifier must keep the images' shape {tuple(images.shape)}, but this one "
                f"returned {tuple(getattr(purified, 'shape', ())) or type(purified).__name__}."
            )
        purified = torch.as_tensor(purified, device=images.device, dtype=images.dtype)
        return purified.clone() if purified.is_inference() else purified


def _seed_from(noise: Noise, images: Tensor) -> int:
    if isinstance(noise, KeyedNoise):
        mixed = int(noise.bits(0, 1).sum()) if len(noise.keys) else 0
        return mixed & (2**63 - 1)
    if isinstance(noise, GeneratorNoise):
        return int(torch.randint(2**62, (1,), generator=noise.generator))
    return fresh_seed()


def as_purifier(purifier: Callable[[Tensor], Tensor]) -> Purifier:
    """Return the purifier itself if it is ours, else wrap it as a `ForeignPurifier`."""
    return purifier if isinstance(purifier, Purifier) else ForeignPurifier(purifier)


BASELINES: dict[str, Callable[[float], Purifier]] = {
    "gaussian": GaussianNoise,
    "jpeg": Jpeg,
    "bits": BitDepth,
    "tv": TotalVariation,
    "median": MedianFilter,
}


def baseline(spec: str) -> Purifier:
    """Make a baseline from its name and one number: "none", "gaussian:0.25", "jpeg:75", "bits:3",
    "tv:0.1" or "median:3".

    Raises:
        UsageError: an unknown name or a number out of range.
    """
    if spec == "none":
        return NoPurifier()
    name, _, value = spec.partition(":")
    try:
        return BASELINES[name](float(value))
    except KeyError:
        names = ", ".join(f"{n}:NUMBER" for n in BASELINES)
        raise UsageError(f"unknown purifier {spec!r}; choose none, {names}.") from None
    except ValueError as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{spec!r} needs a number after the colon, as in {name}:3.") from None
