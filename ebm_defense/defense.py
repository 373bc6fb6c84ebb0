"""A purifier in front of a classifier, averaged over replicates."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ebm_defense.engine.derivatives import arithmetic, vjp
from ebm_defense.errors import UsageError
from ebm_defense.interface.images import PROBED, check_images
from ebm_defense.interface.inputs import as_images
from ebm_defense.interface.modes import in_eval_mode, modules_of, own_dtype
from ebm_defense.interface.numbers import whole
from ebm_defense.interface.outputs import logits_of, told
from ebm_defense.noise import KeyedNoise, chain_keys, fresh_seed
from ebm_defense.precision.classifiers import VERDICT_PRECISIONS, allowed_verdicts
from ebm_defense.precision.findings import versions
from ebm_defense.precision.names import resolve_precision
from ebm_defense.purifiers.base import straight_through
from ebm_defense.purifiers.baselines import NoPurifier
from ebm_defense.purifiers.foreign import as_purifier
from ebm_defense.runtime.packing import Packing
from ebm_defense.storage.folders import save_defense

VOTE_SMOOTHING = 1e-3
PASSES, CHECKED = 8, 16
"""A defense is deterministic if so many passes of up to so many images agree."""


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

    Its gradient is the purifier's identity (BPDA), so attack libraries work on it as it is. Unless
    it is put in training mode, its parts run in evaluation mode, and keep the modes that they have.

    Args:
        classifier: any `nn.Module` that maps `[N, C, H, W]` in [0, 1] to logits `[N, classes]`,
            by themselves or as `logits_of` finds them in its output; see `normalized` for one that
            wants other input.
        purifier: a `Purifier`, or any map of images to images.
        replicates: purifications an image, at least 1; a defense that was checked to be
            deterministic needs and uses one.
        average: a name in `AVERAGES`.
        max_chains: how many chains run at a time, which bounds memory whatever `replicates` is;
            None for 400 on a CPU, and on a GPU for as many as the free memory holds, measured at
            the first call that has more than 400. Out of memory, it is halved and the work done
            again; noise does not depend on it.
        seed: seed of the calls' noise; None for fresh noise. Two calls always differ.
        undefended: the classifier that reports show as undefended; `classifier` if not given.
        verdict_precision: of the classifier where a judge asks, "fp32", "bf16", or "auto": bf16
            where it is fast and a finding that ships, or that `ebm-defense precision` made, shows
            that it names the same classes (see `ebm_defense.precision.classifiers`), else fp32.
            Gradients, attacks and calls of the module always get the classifier as it is.

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
        verdict_precision: str = "auto",
    ) -> None:
        super().__init__()
        replicates = whole(replicates, "replicates")
        max_chains = None if max_chains is None else whole(max_chains, "max_chains")
        if replicates < 1 or (max_chains is not None and max_chains < 1):
            raise UsageError(
                f"replicates and max_chains must be at least 1, not {replicates} and {max_chains}."
            )
        if average not in AVERAGES:
            raise UsageError(f"average is {average!r}; choose one of {', '.join(AVERAGES)}.")
        if verdict_precision not in VERDICT_PRECISIONS:
            raise UsageError(
                f"verdict_precision is {verdict_precision!r}; choose one of "
                f"{', '.join(VERDICT_PRECISIONS)}."
            )
        self.classifier, self.purifier = classifier, as_purifier(purifier)
        self.undefended = classifier if undefended is None else undefended
        self.replicates, self.average = replicates, average
        self.packing = Packing(max_chains)
        self.seed = fresh_seed() if seed is None else whole(seed, "the seed")
        self.calls = 0
        self.verdict_precision = verdict_precision
        self._checked: dict[tuple[Any, ...], str] = {}
        self._same: dict[tuple[Any, ...], bool] = {}
        self._cast: dict[torch.dtype, torch.dtype] = {}
        # Its own mode: the parts keep theirs, which are the caller's.
        self.training = False

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
            UsageError: no float images `[N, C, H, W]`, NaN pixels, pixels far outside [0, 1], or
                images that the classifier cannot take.
        """
        images = as_images(images)
        check_images(images, slack=PROBED)
        with told(images):
            one = self.replicates == 1 or (not self.training and self.check_deterministic(images))
            self.calls += 1
            replicates = range(1 if one else self.replicates)
            keys = chain_keys(self.seed, f"call {self.calls}", range(len(images)), replicates)
            return self.combine(self.replicate_logits(images, keys))

    def try_out(self, images: Tensor, number: int = 0) -> None:
        """Use every part on some images, as briefly as it goes, for the time of this number."""
        some = images.detach()[:2]
        if len(some):
            keys = chain_keys(number, "trying", range(len(some)), range(1))[0].to(images.device)
            short = self.purifier.brief(some)
            short.purify(short.prepared(some), KeyedNoise(keys))
            for classifier in (self.classifier, self.undefended):
                classifier(some.clone())

    @property
    def stochastic(self) -> bool:
        """Whether two passes may differ: unless they were checked not to, they may."""
        return self.purifier.stochastic or not self._same.get(self._about(), False)

    def check_deterministic(self, images: Tensor, *, again: bool = False) -> bool:
        """Find out whether passes of some images `[N, C, H, W]` agree.

        A purifier that says that it is random is believed. Where it says that it is not, or there
        is none, passes of up to `CHECKED` images are compared, each on other noise; once for all,
        or `again`, since no one can see from outside whether a classifier has changed.
        """
        if self.purifier.stochastic:
            return False
        about = self._about()
        if len(images) and (again or about not in self._same):
            some = images.detach()[:CHECKED]
            self._same = {about: self._agrees(some[:1]) and self._agrees(some)}
        return not self.stochastic

    def bare(self) -> PurifiedClassifier:
        """Return the undefended classifier as a defense of no purifier, packed as this one is."""
        bare = PurifiedClassifier(self.undefended, NoPurifier(), 1)
        bare.packing = self.packing
        return bare

    def know(self, other: PurifiedClassifier) -> None:
        """Take over what was found out of a defense of the same parts."""
        self._same = dict(other._same)

    def _agrees(self, images: Tensor) -> bool:
        """Whether several passes agree; torch's global generator is put back as it was."""
        gpus = [images.device] if images.device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(gpus):
            passes = (
                self.replicate_logits(
                    images, chain_keys(k, "determinism", range(len(images)), range(1))
                )
                for k in range(PASSES)
            )
            first = next(passes)
            return all(torch.equal(first, again) for again in passes)

    def _about(self) -> tuple[Any, ...]:
        """Return what changes when a part does, or its weights."""
        parts = id(self.classifier), id(self.purifier)
        return (*parts, *versions(self.classifier), *versions(self.purifier))

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
        prepared = self.purifier.prepared(images.detach())
        self.measure_chains(images, keys)
        with in_eval_mode(modules_of(self.purifier)):
            for attempt in self.packing.tries():
                with attempt:
                    parts = [images[:0]]
                    for rows, k in self.chunks(keys):
                        ends = self.purifier.purify(prepared[rows], KeyedNoise(k))
                        parts.append(straight_through(images[rows], ends.to(images.dtype)))
        return torch.cat(parts).view(*keys.shape, *images.shape[1:])

    def measure_chains(self, images: Tensor, keys: Tensor) -> None:
        """Find once, on a GPU, how many chains its memory holds at a time.

        What is counted is a chain, the gradient of the classifier behind it, and a product of a
        gradient through it: the largest of what an attack has at a time.

        Args:
            images: `[b, C, H, W]` in [0, 1].
            keys: of the chains to come, `[r, b]`, on their device.
        """
        prepared = self.purifier.prepared(images.detach())

        def all_that_is_done(rows: Tensor, k: Tensor) -> None:
            purified = self.purifier.purify(prepared[rows], KeyedNoise(k))
            vjp(lambda x: self.classify(x).sum(), purified, purified.new_ones(()))
            self.purifier.probe_vjp(purified, KeyedNoise(k))

        with torch.no_grad(), in_eval_mode(modules_of(self.purifier)):
            self.packing.measure(all_that_is_done, keys)

    def classify_replicates(self, purified: Tensor) -> Tensor:
        """Map purified replicates `[r, b, C, H, W]` to logits `[r, b, classes]`, in chunks."""
        for attempt in self.packing.tries():
            with attempt:
                logits = self._classify(purified.flatten(0, 1).split(self.max_chains))
        return torch.cat(logits).unflatten(0, purified.shape[:2])

    def _classify(self, parts: tuple[Tensor, ...]) -> list[Tensor]:
        if torch.is_grad_enabled() and parts[0].requires_grad and len(parts) > 1:
            # Recomputing a chunk's activations keeps memory flat in the number of replicates.
            return [checkpoint(self.classify, p, use_reentrant=False) for p in parts]
        return [self.classify(p) for p in parts]

    def classify(self, images: Tensor) -> Tensor:
        """Return the classifier's logits `[N, classes]` of images as they are, unpurified."""
        with nullcontext() if self.training else in_eval_mode(modules_of(self.classifier)):
            return logits_of(self._run(images), images)

    def _run(self, images: Tensor) -> Tensor:
        """Return what the classifier makes of images, cast to its own dtype if it takes no other.

        It gets a copy of its own: some change their input in place, which neither the caller's
        images nor a leaf that gradients are asked at can bear.
        """
        cast = self._cast.get(images.dtype, images.dtype)
        try:
            return self.classifier(images.to(cast, copy=True))
        except RuntimeError:
            own = own_dtype(self.classifier)
            if own in (None, cast):
                raise
            output = self.classifier(images.to(own, copy=True))
        self._cast[images.dtype] = own
        return output

    def replicate_logits(self, images: Tensor, keys: Tensor) -> Tensor:
        """Return logits `[r, b, classes]` of images purified with the noise of `keys` `[r, b]`."""
        return self.classify_replicates(self.purify_replicates(images, keys))

    def verdict_logits(self, images: Tensor, keys: Tensor) -> Tensor:
        """Return `replicate_logits` for a judge: no gradient, in the verdicts' precision."""
        precision = self.resolved_verdict_precision(images)
        with torch.no_grad():
            purified = self.purify_replicates(images, keys)
            if precision != "bf16":
                return self.classify_replicates(purified)
            with arithmetic(precision, images.device):
                return self.classify_replicates(purified)

    def resolved_verdict_precision(self, images: Tensor) -> str:
        """Return the precision in which verdicts on these images would be passed.

        A defense without noise, of which one pass says all, keeps fp32 by "auto", and so do float64
        images.
        """
        asked = self.verdict_precision
        if asked != "auto" or images.dtype != torch.float32:
            return resolve_precision(
                "fp32" if asked == "auto" else asked, images.device, images.dtype
            )
        if not self.stochastic or not len(images):
            return "fp32"
        about = (images.device, *versions(self.classifier))
        if about not in self._checked:
            self._checked = {about: allowed_verdicts(self.classifier, images.device)}
        return self._checked[about]

    def chunks(self, keys: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Split keys `[r, b]` into runs of at most `max_chains`: image rows and keys of each."""
        rows = torch.arange(keys.numel()) % max(keys.shape[1], 1)
        chunks = zip(
            rows.split(self.max_chains), keys.flatten().split(self.max_chains), strict=True
        )
        return [(rows, keys) for rows, keys in chunks if len(rows)]

    def save(self, folder: str | Path) -> Path:
        """Write the defense to a folder that `load_defense` reads; see `folders.save_defense`."""
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
