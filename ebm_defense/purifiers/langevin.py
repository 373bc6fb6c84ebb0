"""Long-run Langevin dynamics on an energy."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

from ebm_defense.energies.tiled import Tiled
from ebm_defense.engine import Energy, prepare_product
from ebm_defense.engine.derivatives import hessian_product
from ebm_defense.errors import UsageError
from ebm_defense.langevin import (
    LangevinSettings,
    Trace,
    chain_precision,
    chain_states,
    run_chain,
)
from ebm_defense.noise import KeyedNoise, Noise, chain_keys
from ebm_defense.precision.chains import (
    Finding,
    affordable,
    allowed_precision,
    check,
    faster_precisions,
    finding_key,
)
from ebm_defense.precision.findings import versions
from ebm_defense.precision.names import PRECISIONS, resolve_precision
from ebm_defense.purifiers.base import Classify, Plain, PreparedVjp, SteppedPurifier


class LangevinPurifier(SteppedPurifier):
    """Long-run Langevin dynamics on an energy (Hill, Mitchell, Zhu 2021, eq. 4).

    Args:
        energy: maps `[N, C, H, W]` in [-1, 1] to `[N]`; any `nn.Module` or function.
        steps: K ≥ 0.
        step_size: ε > 0, in [-1, 1] pixel units.
        temperature: T > 0; the defaults are the published update for CIFAR-10.
        precision: one of `PRECISIONS`, for the energy's inner activations, or "auto": bf16
            where it is fast and a finding that ships, or that `ebm-defense precision` made, shows
            that chains in it purify as fp32 ones do, else fp32. float64 images keep float64.
        adjusted: whether a Metropolis test accepts or refuses each step (MALA); always in fp32. The
            gradients through it hold the decisions fixed, so that they say nothing of how an
            image changes them; score-free attacks see that too.

    Raises:
        UsageError: a setting out of range.
    """

    caption = (
        "{steps} Langevin steps of size {step_size:g} at temperature {temperature:g}, {precision}"
    )
    options = ("precision",)

    def __init__(
        self,
        energy: Energy,
        steps: int = 1500,
        step_size: float = 0.01,
        temperature: float = 5e-5,
        precision: str = "auto",
        adjusted: bool = False,
    ) -> None:
        super().__init__()
        self.settings = LangevinSettings(
            steps=steps, step_size=step_size, temperature=temperature, adjusted=adjusted
        )
        allowed = ("auto", *PRECISIONS)
        if precision not in allowed:
            raise UsageError(f"precision is {precision!r}; choose one of {', '.join(allowed)}.")
        self.energy, self.precision = energy, precision
        self._checked: dict[tuple[Any, ...], str] = {}

    @property
    def numbers(self) -> dict[str, Plain]:
        return asdict(self.settings)

    def record(self, images: Tensor) -> dict[str, Any]:
        chosen = {"precision": self.resolved_precision(images)}
        # What is usual goes unsaid, so that a run goes on that was begun before it could be said.
        usual = () if self.settings.adjusted else ("adjusted",)
        numbers = {k: v for k, v in self.numbers.items() if k not in usual}
        return super().record(images) | numbers | chosen

    @classmethod
    def described(cls, record: Mapping[str, Any]) -> str:
        adjusted = ", Metropolis-adjusted" if record.get("adjusted") else ""
        return super().described(record) + adjusted

    @property
    def image_shape(self) -> tuple[int, int, int] | None:
        shape = getattr(self.energy, "settings", None)
        size = getattr(shape, "image_size", None)
        return None if size is None else (getattr(shape, "channels", 3), size, size)

    def curvature(self, images: Tensor, direction: Tensor) -> Tensor:
        return hessian_product(self.energy, self.enter(images), direction)

    def gradients(self, images: Tensor) -> tuple[str, ...]:
        one = images[:1].detach()
        direction = KeyedNoise(chain_keys(0, "direction", range(len(one)), range(1))[0])
        curved = self.curvature(one, direction.normal(0, one)).any()
        return ("full", "bpda") if curved else ("smoothed", "bpda")

    def remarks(self, images: Tensor, noise: Noise) -> list[str]:
        if not self.adjusted:
            return []
        trace = Trace()
        self.purify(images, noise, trace=trace)
        share = trace.acceptance
        return [] if share is None else [f"{share:.1%} of the first images' steps are accepted"]

    def compare_precisions(
        self, images: Tensor, classify: Classify, labels: Tensor
    ) -> dict[str, tuple[str, Finding]]:
        if not isinstance(self.energy, nn.Module) or not self.chain_steps or self.adjusted:
            return {}
        energy, chain = self.energy, self.settings
        count = max(len(images), affordable(images.device, chain))

        def compared(precision: str) -> tuple[str, Finding]:
            found = check(
                energy, images, chain,
                precision=precision, chains=count, classify=classify, labels=labels,
            )  # fmt: skip
            return finding_key(energy, images, chain, precision), found

        return {p: compared(p) for p in faster_precisions(images.device)}

    def shortened(self, steps: int) -> LangevinPurifier:
        """Return the chain of fewer, larger steps of the same total time Σε², all of them taken.

        Raises:
            UsageError: it takes fewer steps itself.
        """
        self.refuse_more(steps)
        chain = self.settings
        longer = chain.step_size * math.sqrt(chain.steps / steps)
        return LangevinPurifier(self.energy, steps, longer, chain.temperature, self.precision)

    def tiled(self) -> LangevinPurifier:
        """Return the chain on the energy's tiles (`Tiled`), in fp32 unless a precision is named."""
        if self.image_shape is None or not isinstance(self.energy, nn.Module):
            return self  # it takes images of any size as it is
        chain, precision = self.settings, "fp32" if self.precision == "auto" else self.precision
        tiles = Tiled(self.energy, self.image_shape[1])
        return LangevinPurifier(tiles, precision=precision, **asdict(chain))

    def brief(self, images: Tensor) -> LangevinPurifier:
        """Return the chain's first step, in the precision of the whole."""
        chain, precision = self.settings, self.resolved_precision(images)
        precision = precision if precision in PRECISIONS else self.precision
        first = replace(chain, steps=min(1, chain.steps))
        return LangevinPurifier(self.energy, precision=precision, **asdict(first))

    @property
    def chain_steps(self) -> int:  # type: ignore[override]
        return self.settings.steps

    @property
    def adjusted(self) -> bool:
        """Whether a Metropolis test accepts or refuses each step."""
        return self.settings.adjusted

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

    def states(self, x: Tensor, noise: Noise, blocks: Sequence[range]) -> list[Tensor]:
        if type(self).advance is not LangevinPurifier.advance or not blocks:
            return super().states(x, noise, blocks)
        after = chain_states(
            x,
            noise,
            [block.stop for block in blocks],
            energy=self.energy,
            settings=self.settings,
            precision=self.resolved_precision(x),
            first=blocks[0].start,
        )
        return [x, *after]

    def vjp_step(self, cotangent: Tensor, x: Tensor, noise: Noise, step: int) -> Tensor:
        pulled = self.settings.drift * hessian_product(self.energy, x, cotangent)
        return cotangent - (self._moved(x, noise, step) * pulled if self.adjusted else pulled)

    def _moved(self, x: Tensor, noise: Noise, step: int) -> Tensor:
        """Return for each adjusted chain 1 if its step from x was accepted, else 0."""
        with torch.autocast(x.device.type, enabled=False):
            after = self.advance(x, noise, range(step, step + 1))
        return (after != x).flatten(1).any(1).to(x).view(-1, *[1] * (x.ndim - 1))

    def prepared_vjp(self, x: Tensor, precision: str) -> PreparedVjp | None:
        if type(self).vjp_step is not LangevinPurifier.vjp_step or self.adjusted:
            return None
        resolved = resolve_precision(precision, x.device, x.dtype)
        product, drift = prepare_product(self.energy, x, resolved), self.settings.drift
        if product is None:
            return None
        return lambda g, x, lent: torch.sub(g, product(x, g, lent), alpha=drift)

    def probe_vjp(self, images: Tensor, noise: Noise) -> None:
        x = self.enter(images)
        prepared = self.prepared_vjp(x, "fp32")
        if prepared is None:
            self.vjp_step(x, x, noise, 0)
        else:
            prepared(x, x, lambda z, slope: torch.ones_like(z))

    def resolved_precision(self, images: Tensor) -> str:
        """Return the precision that these images would be purified in; see `precision`."""
        if self.precision != "auto" or self.adjusted:
            asked = "fp32" if self.precision == "auto" else self.precision
            return chain_precision(asked, images, self.settings)
        about = (images.device, images.dtype, self.settings, *versions(self.energy))
        if about not in self._checked:
            self._checked = {about: allowed_precision(self.energy, images, self.settings)}
        return self._checked[about]

    def extra_repr(self) -> str:
        s = self.settings
        adjusted = ", adjusted=True" if s.adjusted else ""
        return f"steps={s.steps}, step_size={s.step_size}, temperature={s.temperature}{adjusted}"
