"""Purification by a diffusion model: noise to a level t*, and back by its reverse process."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ebm_defense.denoisers.base import Denoiser, diffused
from ebm_defense.denoisers.read import open_denoiser
from ebm_defense.errors import UsageError
from ebm_defense.interface.numbers import whole
from ebm_defense.noise import Noise
from ebm_defense.purifiers.base import Purifier, SteppedPurifier
from ebm_defense.purifiers.state import State

X, GIVEN = "x", "given"
FIRST = 1
"""Number of the first reverse step's noise; number 0 is that of the way to t*."""


class ReverseStep:
    """One step of the reverse process, from level t to level s < t, or to the image (s = −1).

    x_s = √ᾱ_s·x̂_0 + √(1−ᾱ_s−σ²)·ε̂ + σ·z, σ = η·√((1−ᾱ_s)/(1−ᾱ_t)·(1−ᾱ_t/ᾱ_s))
    (Song, Meng, Ermon 2021, eq. 12 and 16). η = 1 is DDPM with its smaller variance (Ho, Jain,
    Abbeel 2020, eq. 7), η = 0 is DDIM.

    Args:
        alpha: ᾱ_t.
        after: ᾱ_s; 1 for the image.
        eta: η in [0, 1].
    """

    def __init__(self, alpha: float, after: float, eta: float) -> None:
        self.alpha, self.after = alpha, after
        share = (1.0 - after) / (1.0 - alpha) * (1.0 - alpha / after)
        self.variance = eta**2 * max(share, 0.0)
        self.rest = math.sqrt(max(1.0 - after - self.variance, 0.0))

    def __call__(self, x: Tensor, noise: Tensor, z: Tensor, clip: bool) -> Tensor:
        """Move x_t by the estimate of its noise and by fresh noise z, all `[b, C, H, W]`."""
        root, spread = math.sqrt(self.alpha), math.sqrt(1.0 - self.alpha)
        image = (x - spread * noise) / root
        if clip:
            image = image.clamp(-1.0, 1.0)
            noise = (x - root * image) / spread
        moved = math.sqrt(self.after) * image + self.rest * noise
        return moved + math.sqrt(self.variance) * z


class _ByDenoiser(SteppedPurifier):
    """What both say of themselves, whichever way a denoiser moves their images."""

    denoiser: Denoiser
    steps: int

    @property
    def image_shape(self) -> tuple[int, int, int] | None:
        return shape_of(self.denoiser)

    @property
    def chain_steps(self) -> int:  # type: ignore[override]
        return self.steps

    def brief(self, images: Tensor) -> Purifier:
        return self.shortened(1)

    def probe_vjp(self, images: Tensor, noise: Noise) -> None:
        x = self.enter(images)
        self.vjp_step(x, x, noise, 0)


class DiffusionPurifier(_ByDenoiser):
    """Noise up to a level t*, then the reverse process to an image (DiffPure, Nie et al. 2022).

    With one step it is denoised smoothing (Carlini et al. 2023): see `one_shot`. Guidance draws
    each step towards the given image at the same level of noise (GDMP, Wang et al. 2022).

    Args:
        denoiser: estimates noise.
        start: t*, how many levels of noise go over the image: from 1 to the denoiser's `levels`.
        steps: of the reverse process, each one call of the network, from 1 to `start`; fewer than
            `start` are spread evenly over its levels.
        eta: in [0, 1]; 1 is DDPM, 0 is DDIM, which draws no noise on its way back.
        guidance: s ≥ 0 in x_s ← x_s − s·√((1−ᾱ_t)/ᾱ_t)·σ²·∇‖x_t − y_t‖², y_t the given image with
            fresh noise; the published scale, of the mean over pixels, is s times their number.
        clip: whether each estimate of the image is clipped to [-1, 1], as samplers do.

    Raises:
        UsageError: a setting out of range.
    """

    caption = "{how} from t* = {start} in {steps} steps"

    def __init__(
        self,
        denoiser: Denoiser,
        start: int = 100,
        steps: int = 100,
        eta: float = 1.0,
        guidance: float = 0.0,
        clip: bool = False,
    ) -> None:
        super().__init__()
        start, steps = whole(start, "start"), whole(steps, "steps")
        if not 1 <= start <= denoiser.levels:
            raise UsageError(
                f"start must be from 1 to the {denoiser.levels} levels of noise, not {start}."
            )
        if not 1 <= steps <= start:
            raise UsageError(f"steps must be from 1 to start, {start}, not {steps}.")
        if not 0 <= eta <= 1 or not 0 <= guidance < math.inf:
            raise UsageError(
                f"eta must lie in [0, 1] and guidance be 0 or more, not {eta} and {guidance}."
            )
        if guidance and not eta:
            raise UsageError("guidance scales with DDPM's variance, so eta must be above 0.")
        self.denoiser, self.start, self.steps = denoiser, start, steps
        self.eta, self.guidance, self.clip = float(eta), float(guidance), bool(clip)

    @classmethod
    def opened(cls, place: str, **settings: Any) -> DiffusionPurifier:
        """Read a diffusion model; see `open_denoiser`. Without settings it is DiffPure's, DDPM with
        every step from a tenth of all levels.
        """
        denoiser, own = _opened(cls, place, settings)
        start = own.pop("start", max(1, denoiser.levels // 10))
        return cls(denoiser, start, own.pop("steps", start), **own)

    @classmethod
    def one_shot(cls, denoiser: Denoiser, sigma: float) -> DiffusionPurifier:
        """Return denoised smoothing: noise, and one estimate of the image (Carlini et al. 2023).

        Args:
            denoiser: estimates noise.
            sigma: of the noise beside the image, in [0, 1] pixel units; the nearest level is taken.
        """
        return cls(denoiser, denoiser.nearest(2.0 * sigma) + 1, 1)

    def record(self, images: Tensor) -> dict[str, Any]:
        names = {1.0: "DDPM", 0.0: "DDIM"}
        how = names.get(self.eta, f"DDIM with η = {self.eta:g}")
        guided = f" guided by {self.guidance:g}" if self.guidance else ""
        return super().record(images) | {"how": how + guided}

    @property
    def visited(self) -> list[int]:
        """The levels of noise that the network is asked at, the noisiest first."""
        if self.steps == 1:
            return [self.start - 1]
        last = self.start - 1
        return [last - (k * last + (self.steps - 1) // 2) // (self.steps - 1)
                for k in range(self.steps)]  # fmt: skip

    def enter(self, images: Tensor) -> State:
        x = images * 2.0 - 1.0
        return {X: x, GIVEN: x} if self.guidance else x

    def leave(self, x: State) -> Tensor:
        ended: Tensor = x[X] if self.guidance else x
        return (ended + 1.0) / 2.0

    def purify(self, images: Tensor, noise: Noise) -> Tensor:
        with torch.no_grad():
            return super().purify(images, noise)

    def advance(self, x: State, noise: Noise, steps: range) -> State:
        given = x[GIVEN] if self.guidance else None
        at: Tensor = x[X] if self.guidance else x
        levels = [*self.visited, -1]
        for k in steps:
            if k == 0:
                at = self._diffused(at, noise.normal(0, at), levels[0])
            at = self._reversed(at, given, noise, k, levels[k], levels[k + 1])
        return at if given is None else {X: at, GIVEN: given}

    def _diffused(self, x: Tensor, z: Tensor, level: int) -> Tensor:
        return diffused(x, z, x.new_tensor(self.denoiser.alphas[level]))

    def _reversed(
        self, x: Tensor, given: Tensor | None, noise: Noise, k: int, level: int, after: int
    ) -> Tensor:
        alphas = self.denoiser.alphas
        step = ReverseStep(alphas[level], alphas[after] if after >= 0 else 1.0, self.eta)
        # What is not drawn costs nothing, and a stream of keyed noise has no order to keep.
        z = noise.normal(FIRST + 2 * k, x) if step.variance else torch.zeros_like(x)
        moved = step(x, self.denoiser.at(x, level), z, self.clip)
        if given is None or not step.variance:
            return moved
        target = self._diffused(given, noise.normal(FIRST + 2 * k + 1, x), level)
        scale = math.sqrt((1.0 - step.alpha) / step.alpha) * step.variance
        return moved - self.guidance * scale * 2.0 * (x - target)

    def shortened(self, steps: int) -> DiffusionPurifier:
        """Return the reverse process from the same t* in fewer, larger steps.

        Raises:
            UsageError: it takes fewer steps itself.
        """
        self.refuse_more(steps)
        return self.remade(steps=steps)


class LikelihoodPurifier(_ByDenoiser):
    """Climbs the diffusion model's likelihood near the image (LM, Chen et al. 2024, RDC).

    A step draws a level t and noise, and moves against the gradient of ‖ε_θ(x_t, t) − ε‖², a
    bound of −log p(x), through the network: m ← μ·m − g/‖g‖₂, x ← Π(x + γ·m), where Π keeps x
    within an L2 ball around the given image.

    Args:
        denoiser: estimates noise.
        steps: N ≥ 1, each a gradient of the network.
        step_size: γ > 0, an L2 length in [-1, 1] units.
        radius: of the ball, > 0, in [-1, 1] units.
        momentum: μ in [0, 1].
        low, high: the levels that are drawn, as shares of all, 0 ≤ low < high ≤ 1.

    Raises:
        UsageError: a setting out of range.
    """

    caption = "{steps} likelihood steps of {step_size:g} within {radius:g}"

    def __init__(
        self,
        denoiser: Denoiser,
        steps: int = 5,
        step_size: float = 1.0,
        radius: float = 5.0,
        momentum: float = 1.0,
        low: float = 0.1,
        high: float = 0.5,
    ) -> None:
        super().__init__()
        steps = whole(steps, "steps")
        if steps < 1 or not 0 <= low < high <= 1 or not 0 <= momentum <= 1:
            raise UsageError(
                "steps must be 1 or more, 0 ≤ low < high ≤ 1 and momentum in [0, 1], not "
                f"{steps}, {low}, {high} and {momentum}."
            )
        if not (0 < step_size < math.inf and 0 < radius < math.inf):
            raise UsageError(f"step_size and radius must be above 0, not {step_size} and {radius}.")
        self.denoiser, self.steps = denoiser, steps
        self.step_size, self.radius = float(step_size), float(radius)
        self.momentum, self.low, self.high = float(momentum), float(low), float(high)

    @classmethod
    def opened(cls, place: str, **settings: Any) -> LikelihoodPurifier:
        """Read a diffusion model; see `open_denoiser`."""
        denoiser, own = _opened(cls, place, settings)
        return cls(denoiser, **own)

    def enter(self, images: Tensor) -> State:
        x = images * 2.0 - 1.0
        return {X: x, GIVEN: x, "momentum": torch.zeros_like(x)}

    def leave(self, x: State) -> Tensor:
        return (x[X] + 1.0) / 2.0

    def advance(self, x: State, noise: Noise, steps: range) -> State:
        at, given, momentum = x[X], x[GIVEN], x["momentum"]
        for k in steps:
            momentum = self.momentum * momentum - _unit(self._slope(at, noise, k))
            away = at + self.step_size * momentum - given
            at = given + away * (self.radius / _length(away)).clamp_max(1.0)
        return {X: at, GIVEN: given, "momentum": momentum}

    def _slope(self, x: Tensor, noise: Noise, k: int) -> Tensor:
        """Return the gradient by x of ‖ε_θ(x_t, t) − ε‖² at the level and noise of step k."""
        second = x.requires_grad
        # torch's faster attention has no second derivative.
        kernel = sdpa_kernel(SDPBackend.MATH) if second else nullcontext()
        with torch.inference_mode(False), torch.enable_grad(), kernel:
            inside = x if second else x.detach().clone().requires_grad_()
            level, z = (
                self._level(noise.normal(2 * k, x[:, :1, :1, :1])),
                noise.normal(2 * k + 1, x),
            )
            noisy = diffused(inside, z, self.denoiser.alpha(level, x))
            loss = (self.denoiser(noisy, level) - z).square().sum()
            (slope,) = torch.autograd.grad(loss, inside, create_graph=second)
        return slope

    def _level(self, z: Tensor) -> Tensor:
        """Return a level drawn evenly between `low` and `high` from one normal an image."""
        uniform = 0.5 * (1.0 + torch.erf(z.flatten() / math.sqrt(2.0)))
        share = self.low + (self.high - self.low) * uniform
        return (share * self.denoiser.levels).long().clamp(0, self.denoiser.levels - 1)

    def shortened(self, steps: int) -> LikelihoodPurifier:
        """Return one of fewer, larger steps of the same total length.

        Raises:
            UsageError: it takes fewer steps itself.
        """
        self.refuse_more(steps)
        longer = self.step_size * self.steps / steps
        return self.remade(steps=steps, step_size=longer)


def _opened(
    kind: type[Purifier], place: str, settings: dict[str, Any]
) -> tuple[Denoiser, dict[str, Any]]:
    """Return the denoiser, and those of the settings that are the purifier's own."""
    own = {k: v for k, v in settings.items() if k in kind.arguments()}
    return open_denoiser(place, **{k: v for k, v in settings.items() if k not in own}), own


def shape_of(denoiser: Denoiser) -> tuple[int, int, int] | None:
    """Return the shape `[C, H, W]` of a denoiser's images, if it says it."""
    size = getattr(getattr(denoiser, "settings", None), "image_size", None)
    return None if size is None else (denoiser.settings.channels, size, size)


def _length(x: Tensor) -> Tensor:
    squares = x.square().flatten(1).sum(1)
    return squares.clamp_min(torch.finfo(x.dtype).tiny).sqrt().view(-1, 1, 1, 1)


def _unit(x: Tensor) -> Tensor:
    return x / _length(x)
