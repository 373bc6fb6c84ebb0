"""A purifier in front of a classifier, averaged over replicates."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ebm_defense.errors import UsageError
from ebm_defense.images import check_images
from ebm_defense.noise import KeyedNoise, chain_keys, fresh_seed
from ebm_defense.packing import Packing
from ebm_defense.purifiers import NoPurifier, as_purifier

VOTE_SMOOTHING = 1e-3


def mean_logits(logits: Tensor) -> Tensor:
    """Average replicate logits `[r, b, classes]` to `[b, classes]` (the published rule)."""
    return logits.mean(0)


def mean_softmax(logits: Tensor) -> Tensor:
    """Return the logarithm of the mean softmax over replicates."""
    return logits.log_softmax(-1).logsumexp(0) - math.log(len(logits))


def mean_log_softmax(logits: Tensor) -> Tensor:
    """Return the mean log-softmax over replicates."""
    return logits.log_softmax(-1).mean(0)


def votes(logits: Tensor) -> Tensor:
    """Return log vote shares; a vote has no gradient, so attackers get the mean logits'.

    Shares are smoothed by 0.001 of a vote a class, so that a class without votes stays finite.
    """
    classes = logits.shape[-1]
    counts = F.one_hot(logits.argmax(-1), classes).sum(0).to(logits.dtype) + VOTE_SMOOTHING
    shares = (counts / counts.sum(-1, keepdim=True)).log()
    mean = logits.mean(0)
    return shares + (mean - mean.detach())


AVERAGES: dict[str, Callable[[Tensor], Tensor]] = {
    "logits": mean_logits,
    "softmax": mean_softmax,
    "log_softmax": mean_log_softmax,
    "votes": votes,
}


class PurifiedClassifier(nn.Module):
    """A classifier behind a purifier, averaged over replicates (EOT).

    Its gradient is the purifier's identity (BPDA), so attack libraries work on it as it is.

    Args:
        classifier: any `nn.Module` that maps `[N, C, H, W]` in [0, 1] to logits `[N, classes]`;
            see `normalized` for one that wants other input.
        purifier: a `Purifier`, or any map of images to images.
        replicates: purifications an image, at least 1; a deterministic purifier needs and uses one.
        average: a name in `AVERAGES`.
        max_chains: how many chains run at a time, which bounds memory whatever `replicates` is;
            None for 400 on a CPU, and on a GPU for as many as the free memory holds, measured at
            the first call that has more than 400. Out of memory, it is halved and the work done
            again; noise does not depend on it.
        seed: seed of the calls' noise; None for fresh noise. Two calls always differ.
        undefended: the classifier that reports show as undefended; `classifier` if not given.

    Raises:
        UsageError: a setting out of range.
    """

    def __init__(
        self,
        classifier: nn.Module,
        purifier: Callable[[Tensor], Tensor],
        replicates: int = 16,
        *,
        average: str = "logits",
        max_chains: int | None = None,
        seed: int | None = None,
        undefended: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if replicates < 1 or (max_chains is not None and max_chains < 1):
            raise UsageError(
                f"replicates and max_chains must be at least 1, not {replicates} and {max_chains}."
            )
        if average not in AVERAGES:
            raise UsageError(f"average is {average!r}; choose one of {', '.join(AVERAGES)}.")
        self.classifier, self.purifier = classifier, as_purifier(purifier)
        self.undefended = classifier if undefended is None else undefended
        self.replicates, self.average = replicates, average
        self.packing = Packing(max_chains)
        self.seed = fresh_seed() if seed is None else seed
        self.calls = 0
        self.eval()

    @property
    def max_chains(self) -> int:
        """How many chains run at a time."""
        return self.packing.chains

    @max_chains.setter
    def max_chains(self, chains: int) -> None:
        self.packing.chains = chains

    def forward(self, images: Tensor) -> Tensor:
        """Map images `[N, C, H, W]` in [0, 1] to averaged logits `[N, classes]`, on fresh noise.

        Raises:
            UsageError: no float images `[N, C, H, W]`, NaN pixels, or pixels far outside [0, 1].
        """
        # Attacks may probe a little outside the box; a forgotten division by 255 goes far.
        check_images(images, slack=0.5)
        self.calls += 1
        replicates = range(self.replicates if self.purifier.stochastic else 1)
        keys = chain_keys(self.seed, f"call {self.calls}", range(len(images)), replicates)
        return self.combine(self.replicate_logits(images, keys))

    def combine(self, logits: Tensor) -> Tensor:
        """Average replicate logits `[r, b, classes]` to `[b, classes]` by the defense's rule."""
        return AVERAGES[self.average](logits)

    def purify_replicates(self, images: Tensor, keys: Tensor) -> Tensor:
        """Purify each image once a key.

        Args:
            images: `[b, C, H, W]` in [0, 1].
            keys: `[r, b]` from `chain_keys`.

        Returns:
            `[r, b, C, H, W]`; the gradient to `images` is the identity, summed over replicates.
        """
        keys = keys.to(images.device)
        self.packing.measure(lambda rows, k: self._purify([(rows, k)], images), keys)
        parts = self.packing.fitting(lambda: self._purify(self.chunks(keys), images))
        flat = torch.cat(parts) if parts else images.new_empty((0, *images.shape[1:]))
        return flat.view(*keys.shape, *images.shape[1:])

    def _purify(self, chunks: list[tuple[Tensor, Tensor]], images: Tensor) -> list[Tensor]:
        return [self.purifier(images[rows], noise=KeyedNoise(k)) for rows, k in chunks]

    def classify_replicates(self, purified: Tensor) -> Tensor:
        """Map purified replicates `[r, b, C, H, W]` to logits `[r, b, classes]`, in chunks."""
        logits = self.packing.fitting(lambda: self._classify(purified))
        return torch.cat(logits).unflatten(0, purified.shape[:2])

    def _classify(self, purified: Tensor) -> list[Tensor]:
        parts = purified.flatten(0, 1).split(self.max_chains)
        if torch.is_grad_enabled() and purified.requires_grad and len(parts) > 1:
            # Recomputing a chunk's activations keeps memory flat in the number of replicates.
            return [checkpoint(self.classifier, p, use_reentrant=False) for p in parts]
        return [self.classifier(p) for p in parts]

    def replicate_logits(self, images: Tensor, keys: Tensor) -> Tensor:
        """Return logits `[r, b, classes]` of images purified with the noise of `keys` `[r, b]`."""
        return self.classify_replicates(self.purify_replicates(images, keys))

    def chunks(self, keys: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Split keys `[r, b]` into runs of at most `max_chains`: image rows and keys of each."""
        rows = torch.arange(keys.numel()) % max(keys.shape[1], 1)
        chunks = zip(
            rows.split(self.max_chains), keys.flatten().split(self.max_chains), strict=True
        )
        return [(rows, keys) for rows, keys in chunks if len(rows)]

    def save(self, folder: str | Path) -> Path:
        """Write the defense to a folder that `load_defense` reads; see `weights.save_defense`."""
        from ebm_defense.weights import save_defense

        return save_defense(self, folder)


def as_defense(model: Callable[[Tensor], Tensor]) -> PurifiedClassifier:
    """Return a `PurifiedClassifier` as it is; wrap any other classifier with no purifier."""
    if isinstance(model, PurifiedClassifier):
        return model
    return PurifiedClassifier(_module(model), NoPurifier(), replicates=1)


class _Function(nn.Module):
    """A plain function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def _module(model: Callable[[Tensor], Tensor]) -> nn.Module:
    return model if isinstance(model, nn.Module) else _Function(model)
