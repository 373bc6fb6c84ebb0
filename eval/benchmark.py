"""One call from a model to its accuracies, in the manner of RobustBench."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ebm_defense.attacks.norms import norm_name
from ebm_defense.data import Images, customary_eps, load_data, stratified_order
from ebm_defense.errors import UsageError
from ebm_defense.eval.evaluate import evaluate
from ebm_defense.eval.protocols.protocol import get_protocol
from ebm_defense.eval.reporting.report import Report
from ebm_defense.interface.inputs import read_batch
from ebm_defense.interface.numbers import whole


class Benchmark(NamedTuple):
    """What `benchmark` found.

    Attributes:
        clean: share of images right by the mean of fresh draws.
        robust: share of images that stand under every attack.
        report: all the rest.
    """

    clean: float
    robust: float
    report: Report


def benchmark(
    model: Callable[[Tensor], Tensor],
    n_examples: int = 1000,
    dataset: Any = "cifar10",
    threat_model: str = "Linf",
    eps: float | None = None,
    *,
    protocol: str = "quick",
    split: str = "test",
    data_dir: str | Path | None = None,
    device: str | torch.device = "cpu",
    seed: int = 0,
    out: str | Path | None = None,
) -> Benchmark:
    """Measure a model's clean and robust accuracy on a data set.

    The call is RobustBench's (Croce et al. 2021), the judgement ours: random models are judged on
    fresh draws.

    Args:
        model: any classifier of [0, 1] images, deterministic or random.
        n_examples: how many images, a stratified sample.
        dataset: a name in `ebm_defense.data.DATASETS`; or a data set or data loader of your own,
            as `read_batch` takes it, with an eps.
        threat_model: "Linf", "L2" or "L1".
        eps: in [0, 1] units; the data set's custom in this norm if not given.
        protocol: a name in `PROTOCOLS`.
        split: "train", "val" or "test".
        data_dir: where the data lie.
        device: where the images go; a module is moved there too.
        seed: of every stream.
        out: a run folder.

    Raises:
        UsageError: as `load_data`, `get_protocol` and `evaluate`.
    """
    size = _eps(dataset, threat_model) if eps is None else eps
    count = whole(n_examples, "n_examples")
    if isinstance(dataset, str):
        data = load_data(dataset, split, count, root=data_dir)
    else:
        data = _sample(*read_batch(dataset), count)
    images, labels = (part.to(device) for part in data)
    if isinstance(model, torch.nn.Module):
        model = model.to(device)
    chosen = get_protocol(protocol, norm=threat_model, eps=size)
    report = evaluate(model, images, labels, chosen, seed=seed, out=out)
    return Benchmark(report.share("clean").value, report.robust().value, report)


def _eps(dataset: Any, norm: str) -> float:
    if isinstance(dataset, str):
        return customary_eps(dataset, norm_name(norm))
    raise UsageError("a data set of your own has no customary eps; give one, in [0, 1] units.")


def _sample(images: Tensor, labels: Tensor, count: int) -> Images:
    """Return a stratified sample, or all where there are no more."""
    chosen = stratified_order(labels.cpu(), 0)[:count]
    return Images(images[chosen], labels[chosen])
