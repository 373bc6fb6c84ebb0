"""Attributes composed in latent space, and followed by an ordinary differential equation."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from ebm_defense.generators.networks import LatentClassifier
from ebm_defense.noise import Noise
from ebm_defense.purifiers.path import Joint, LatentPath, from_unit, to_unit


class AttributePurifier(LatentPath):
    """Moves latents to where what they seem to show is plain (Nie, Vahdat, Anandkumar 2021).

    Of the density N(z; 0, I)·Π_a p(c_a | z) the probability flow is dz/dt = −∇E(z), E = Σ_a E_a,
    in the time ∫β/2 of a variance-preserving diffusion. An image's attributes c are not known, so
    each is composed of its values: E_a = −log Σ_v b_v·p(v | z), their disjunction (Du, Li, Mordatch
    2020) weighted by the belief b = p(v | Enc(x)) of the start; the attributes are conjoined. With
    classes as the one attribute it is class-conditional composition. Steps are Heun's, of second
    order, and nothing is random.

    Args:
        latent_classifier: log p(c | z), z `[N, d]` to `[N, Σ values]`.
        generator: G, z `[N, d]` to images in [-1, 1].
        encoder: Enc, images in [-1, 1] to z.
        steps: of the solver, ≥ 0.
        time: that the flow takes, > 0.

    Raises:
        UsageError: a setting out of range.
    """

    caption = "attributes composed in latent space, a flow of time {time:g} in {steps} steps"
    stochastic = False

    def __init__(
        self,
        latent_classifier: LatentClassifier,
        generator: nn.Module,
        encoder: nn.Module,
        steps: int = 10,
        time: float = 1.0,
    ) -> None:
        super().__init__()
        self.latent_classifier: LatentClassifier = latent_classifier
        self.generator, self.encoder = generator, encoder
        self.steps, self.time = steps, time
        self.check(time=time)

    def enter(self, images: Tensor) -> Joint:
        x = from_unit(images)
        z = self.net("encoder", x)(x)
        return {"z": z, "belief": self.net("latent_classifier", z)(z).exp()}

    def leave(self, x: Joint) -> Tensor:
        return to_unit(self.net("generator", x["z"])(x["z"]))

    def energy(self, z: Tensor, belief: Tensor) -> Tensor:
        """Return E(z), `[b]`, by the belief `[b, Σ values]` in each value."""
        values = list(self.latent_classifier.settings.values)
        seen = (belief * self.net("latent_classifier", z)(z).exp()).split(values, dim=1)
        return -torch.stack([part.sum(1).log() for part in seen]).sum(0)

    def advance(self, x: Joint, noise: Noise, steps: range) -> Joint:
        z, belief, h = x["z"], x["belief"], self.time / max(self.steps, 1)
        for _ in steps:
            slope = self._slope(z, belief)
            z = z - h / 2 * (slope + self._slope(z - h * slope, belief))
        return {"z": z, "belief": belief}

    def brief(self, images: Tensor) -> Self:
        return self.remade(steps=min(1, self.steps), time=self.time / max(self.steps, 1))

    def _slope(self, z: Tensor, belief: Tensor) -> Tensor:
        """Return ∇E(z), with a graph where the caller wants one."""
        linked = torch.is_grad_enabled() and (z.requires_grad or belief.requires_grad)
        with torch.inference_mode(False), torch.enable_grad():
            # A view, since in the first step the belief depends on z itself.
            own = linked and z.requires_grad
            at = z.view_as(z) if own else z.detach().clone().requires_grad_()
            value = self.energy(at, belief if linked else belief.detach().clone())
            (slope,) = torch.autograd.grad(value.sum(), at, create_graph=linked)
        return slope

    def shortened(self, steps: int) -> Self:
        """Return the flow of the same time in fewer steps.

        Raises:
            UsageError: it takes fewer steps itself.
        """
        self.refuse_more(steps)
        return self.remade(steps=steps)
