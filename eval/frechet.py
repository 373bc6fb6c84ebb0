"""The Fréchet distance between images and samples, in the features of a network that is named.

FID (Heusel et al. 2017) is this distance in the features of one Inception network and of no other;
numbers in other features compare with each other alone, and are called by the features' name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy import linalg
from torch import Tensor, nn

from ebm_defense._torchvision import torchvision
from ebm_defense.errors import UsageError
from ebm_defense.interface.modes import in_eval_mode, modules_of
from ebm_defense.runtime.optional import optional

Features = Callable[[Tensor], Tensor]
"""Maps images `[n, C, H, W]` in [0, 1] to features `[n, d]`."""
Array = np.ndarray[Any, Any]
BATCH = 200


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Return ‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2(Σ₁Σ₂)^½) (Dowson, Landau 1982).

    Args:
        first: features `[n, d]`, n above 1; the estimate is the more biased the fewer there are.
        second: likewise.

    Raises:
        UsageError: fewer than two of either.
    """
    if min(len(first), len(second)) < 2:
        raise UsageError("a Fréchet distance needs two images or more of either kind.")
    (m1, s1), (m2, s2) = (_moments(f.double().cpu().numpy()) for f in (first, second))
    # The product of two covariances has the eigenvalues of a covariance; rounding may make some
    # of them slightly negative or complex.
    eigenvalues = linalg.eigvals(s1 @ s2).real.clip(min=0.0)
    spread = np.trace(s1) + np.trace(s2) - 2.0 * np.sqrt(eigenvalues).sum()
    return float(((m1 - m2) ** 2).sum() + spread)


def _moments(features: Array) -> tuple[Array, Array]:
    return features.mean(0), np.atleast_2d(np.cov(features, rowvar=False))


def features_of(network: nn.Module) -> Features:
    """Return what a classifier's last linear layer sees, as features.

    Args:
        network: images `[n, C, H, W]` in [0, 1] to logits.

    Raises:
        UsageError: it has no linear layer.
    """
    linear = [m for m in network.modules() if isinstance(m, nn.Linear)]
    if not linear:
        raise UsageError(
            f"a {type(network).__name__} has no linear layer whose input could be its features."
        )

    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        seen: list[Tensor] = []
        hook = linear[-1].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        try:
            with in_eval_mode(modules_of(network)):
                for part in images.split(BATCH):
                    network(part)
        finally:
            hook.remove()
        return torch.cat(seen).flatten(1).cpu()

    return features


def inception_fid(first: Tensor, second: Tensor) -> float:
    """Return the FID of images `[n, C, H, W]` in [0, 1] by torch-fidelity (Heusel et al. 2017).

    Raises:
        UsageError: torch-fidelity is not installed, or Inception's weights cannot be had.
    """
    torchvision("transforms")  # which torch-fidelity imports by itself, without its way around
    fidelity = optional("torch_fidelity", "torch-fidelity", "fid")
    try:
        found = fidelity.calculate_metrics(
            input1=_Bytes(first), input2=_Bytes(second), fid=True, verbose=False,
            cuda=torch.cuda.is_available(), save_cpu_ram=True,
        )  # fmt: skip
    except Exception as error:  # the weights are downloaded, and networks fail in many ways
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UsageError(
            f"FID needs Inception's weights, which cannot be had here ({reason}); measure in a "
            "classifier's features instead."
        ) from error
    return float(found["frechet_inception_distance"])


class _Bytes(torch.utils.data.Dataset[Tensor]):
    """Images as torch-fidelity reads them: three channels of bytes."""

    def __init__(self, images: Tensor) -> None:
        self.images = (images.clamp(0, 1) * 255).round().byte().cpu().expand(-1, 3, -1, -1)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]
