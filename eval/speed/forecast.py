"""What an evaluation will cost, before it is begun."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ebm_defense.engine.derivatives import vjp
from ebm_defense.eval.judging.check_model import check_model
from ebm_defense.eval.runner import SHARD, Job, planned_steps, shards_at_once
from ebm_defense.noise import KeyedNoise, chain_keys
from ebm_defense.purifiers.base import Purifier, SteppedPurifier
from ebm_defense.runtime.timing import alternate

TIMED_SECONDS = 2.0
TIMED_STEPS = {"cpu": 5, "cuda": 250}
"""On a GPU enough for chains to be captured as graphs before they are timed."""
FLOATS_A_PIXEL = 200
"""That a chain and the classifier behind it hold at a time, roughly."""


def forecast(job: Job) -> str:
    """Return in lines what a job will cost, measured on a short piece of it.

    Raises:
        UsageError: images or labels that do not fit the model.
    """
    check_model(job.defense, job.images, job.labels)
    images, steps = len(job.labels), planned_steps(job)
    chains = chains_at_once(job)
    memory = chains * job.images[0].numel() * 4 * FLOATS_A_PIXEL / 2**30
    lines = [f"protocol {job.protocol.name}, {images} images"]
    if steps:
        rate = chain_steps_per_second(job, chains)
        unknown = [attack.name for attack in job.protocol.attacks if attack.open_ended]
        least = "at least " if unknown else ""
        lines += [
            f"chain-steps: {least}{steps * images:,} if every image stands to the end, "
            f"verifications not counted{_depends(unknown)}",
            f"expected time: {least}{steps * images / rate / 3600:.2f} h at {rate:,.0f} "
            "chain-steps a second, classifier included, measured now",
        ]
    else:
        lines += ["no chain-steps: what it costs is the classifier's own"]
    return "\n".join(
        [*lines, f"memory: about {memory:.1f} GiB for {chains} chains, besides the program's own"]
    )


def _depends(attacks: Sequence[str]) -> str:
    return (
        f"; how often {', '.join(attacks)} asks the defense depends on the library"
        if attacks
        else ""
    )


def chains_at_once(job: Job) -> int:
    """Return how many chains a look of the last attack runs at a time."""
    ready = SHARD * shards_at_once(job) * job.protocol.attacks[-1].replicates
    keys = chain_keys(0, "forecast", range(len(job.images)), range(-(-ready // len(job.images))))
    job.defense.measure_chains(job.images, keys.to(job.images.device))
    return min(job.defense.max_chains, ready)


def chain_steps_per_second(job: Job, chains: int) -> float:
    """Return how many Langevin steps a second looks of so many chains make, classifier included."""
    images = job.images[torch.arange(chains) % len(job.images)]
    purifier = job.defense.purifier
    cut, enough = isinstance(purifier, SteppedPurifier), TIMED_STEPS.get(images.device.type, 5)
    few = min(enough, purifier.chain_steps) if cut else purifier.chain_steps
    one, classify = images.new_ones(()), job.defense.classify
    t = alternate(
        {
            "chain": lambda: _first_steps(purifier, images, few),
            "look": lambda: vjp(lambda x: classify(x).sum(), images, one),
        },
        TIMED_SECONDS,
        images.device,
    )
    return chains / (t["chain"] / few + t["look"] / purifier.chain_steps)


def _first_steps(purifier: Purifier, images: Tensor, few: int) -> None:
    """Run a chain's first steps, or the whole of a purifier that cannot be cut into steps."""
    keys = chain_keys(0, "forecast", range(len(images)), range(1))[0]
    noise = KeyedNoise(keys.to(images.device))
    with torch.no_grad():
        if isinstance(purifier, SteppedPurifier):
            purifier.advance(purifier.enter(images), noise, range(few))
        else:
            purifier.purify(images, noise)
