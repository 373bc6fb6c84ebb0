"""What every public image tensor is: `[N, C, H, W]` float in [0, 1]."""

from __future__ import annotations

import torch
from torch import Tensor

from ebm_defense.errors import UsageError

ROUNDING = 1e-5
PROBED = 0.5
"""How far outside [0, 1] an attack may probe. A forgotten division by 255, or [-1, 1], goes
further."""
PURIFIED = 4.0
"""How far outside [0, 1] purified images may lie, which noise was added to and nothing clamped."""


def check_images(images: Tensor, *, slack: float = ROUNDING, name: str = "images") -> None:
    """Refuse what is not a batch of finite [0, 1] images, in one sentence.

    Args:
        images: the candidate.
        slack: how far outside [0, 1] a pixel may lie.
        name: what to call the tensor.

    Raises:
        UsageError: another shape or dtype, NaN or infinite pixels, or pixels outside [0, 1].
    """
    if images.ndim != 4 or not images.is_floating_point():
        raise UsageError(
            f"{name} must be a float tensor [N, C, H, W] in [0, 1], not {images.dtype} of shape "
            f"{tuple(images.shape)}{_hint(images)}."
        )
    if images.numel() == 0:
        return
    low, high = (float(v) for v in torch.aminmax(images.detach()))
    if not (low > -float("inf") and high < float("inf")):
        raise UsageError(f"{name} hold NaN or infinite pixels; remove them first.")
    if low < -slack or high > 1.0 + slack:
        raise UsageError(
            f"{name} must lie in [0, 1], but their pixels run from {low:.4g} to {high:.4g}; "
            "divide 8-bit images by 255, and undo any normalisation."
        )


def _hint(images: Tensor) -> str:
    """Return what would make a batch of images of a tensor, where that is plain."""
    if images.ndim == 4:
        return "; divide 8-bit images by 255" if images.dtype == torch.uint8 else ""
    if images.ndim == 3:
        return "; add the axis of the batch or of the channel"
    return ""


def check_labels(labels: Tensor, images: Tensor) -> None:
    """Refuse labels that are not one non-negative integer an image."""
    if labels.shape != images.shape[:1] or labels.is_floating_point():
        raise UsageError(
            f"labels must be {len(images)} integers, one an image, not {labels.dtype} of shape "
            f"{tuple(labels.shape)}."
        )
    if len(labels) and int(labels.min()) < 0:
        raise UsageError("labels must be 0 or more.")
