"""What an evaluation will cost, before it is begun."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ebm_defense.defense import PurifiedClassifier
from ebm_defense.engine.derivatives import vjp
from ebm_defense.eval.judging.check_model import check_model
from ebm_defense.eval.running.job import Job
from ebm_defense.eval.running.runner import SHARD, planned_steps, shards_at_once
from ebm_defense.noise import KeyedNoise, chain_keys
from ebm_defense.purifiers.base import SteppedPurifier
from ebm_defense.runtime.timing import alternate, peak_memory, timed

TIMED_SECONDS = 2.0
TIMED_STEPS = {"cpu": 5, "cuda": 250}
"""On a GPU enough for chains to be captured as graphs before they are timed."""
ENOUGH = 0.5
"""Seconds of a trial that say how long more of it takes; a quicker one is repeated with more."""
GROWTH, MORE_STEPS = 4, 4
FLOATS_A_PIXEL = 200
"""That a chain and the classifier behind it hold at a time, roughly, where nothing was measured."""


class Trial(NamedTuple):
    """A look of so many chains of one step: the seconds of the step and of the classifier, and the
    highest bytes held meanwhile (None where unknown).
    """

    chains: int
    chain: float
    look: float
    memory: int | None


def forecast(job: Job) -> str:
    """Return in lines what a job will cost, measured on a short piece of it.

    Trials begin with one chain of one step, and grow until they last or are the whole.

    Raises:
        UsageError: images or labels that do not fit the model.
    """
    brief, whole = _brief(job), job.defense.purifier.chain_steps
    check_model(brief.defense, job.images, job.labels)
    job.defense.know(brief.defense)
    images, steps = len(job.labels), planned_steps(job)
    chains = chains_at_once(job)
    lines = [f"protocol {job.protocol.name}, {images} images"]
    trials = list(_trials(brief, chains)) if steps else []
    if not steps:
        lines += ["no chain-steps: what it costs is the classifier's own"]
    else:
        rate = _rate(brief, whole, trials[-1], chains)
        unknown = [attack.name for attack in job.protocol.attacks if attack.open_ended]
        least = "at least " if unknown else ""
        unsaid = "" if job.protocol.judged_once else ", verifications not counted"
        lines += [
            f"chain-steps: {least}{steps * images:,} if every image stands to the end"
            f"{unsaid}{_depends(unknown)}",
            f"expected time: {least}{steps * images / rate / 3600:,.2f} h at {rate:,.4g} "
            f"chain-steps a second, classifier included, measured now{_tried(trials[-1], chains)}",
        ]
    gib = _memory(job, trials, chains) / 2**30
    return "\n".join(
        [*lines, f"memory: about {gib:.1f} GiB for {chains} chains, besides the program's own"]
    )


def _brief(job: Job) -> Job:
    """Return a job of one step, whose purifier looks for no faster precision first."""
    purifier = job.defense.purifier.brief(job.images[:1])
    if purifier is job.defense.purifier:
        return job
    whole = job.defense
    defense = PurifiedClassifier(
        whole.classifier, purifier, whole.replicates, undefended=whole.undefended
    )
    defense.packing = whole.packing
    return replace(job, defense=defense)


def _depends(attacks: Sequence[str]) -> str:
    if not attacks:
        return ""
    return f"; how often {', '.join(attacks)} asks the defense depends on the library"


def _tried(trial: Trial, chains: int) -> str:
    return "" if trial.chains == chains else f" on {trial.chains} of {chains} chains"


def chains_at_once(job: Job) -> int:
    """Return how many chains a look of the last attack runs at a time."""
    ready = SHARD * shards_at_once(job) * job.protocol.attacks[-1].replicates
    keys = chain_keys(0, "forecast", range(len(job.images)), range(-(-ready // len(job.images))))
    job.defense.measure_chains(job.images, keys.to(job.images.device))
    return min(job.defense.max_chains, ready)


def _trials(brief: Job, chains: int) -> Iterator[Trial]:
    """Yield trials of none and ever more chains, the last long enough to tell or of them all."""
    count = 1
    yield Trial(0, 0.0, 0.0, peak_memory(lambda: None, brief.images.device))
    _trial(brief, count)  # the first of all pays for what later ones find ready
    with tqdm(desc="timing", unit="trial", disable=None) as bar:
        while True:
            bar.set_postfix_str(f"{count} of {chains} chains")
            trial = _trial(brief, count)
            bar.update()
            yield trial
            if count == chains or trial.chain + trial.look > ENOUGH:
                return
            count = min(chains, GROWTH * count)


def _trial(brief: Job, count: int) -> Trial:
    chain, look, steps = _pieces(brief, count, 1)
    seconds: list[float] = []
    device = brief.images.device

    def both() -> None:
        seconds.extend(timed(run, device, time.perf_counter) for run in (chain, look))

    memory = peak_memory(both, device)
    if not seconds:
        both()
    return Trial(count, seconds[0] / steps, seconds[1], memory)


def _rate(brief: Job, whole: int, last: Trial, chains: int) -> float:
    """Return the chain-steps a second of all chains, of `whole` steps each."""
    if last.chains == chains and last.chain + last.look <= ENOUGH:
        last = _measured(brief, whole, chains)  # so quick that one trial says little
        return last.chains / (last.chain + last.look / whole)
    return last.chains / (_step_alone(brief, last) + last.look / whole)


def _step_alone(brief: Job, last: Trial) -> float:
    """Return the seconds of a step by what more of them add, as an engine prepares once a chain."""
    chain, _, whole = _pieces(brief, last.chains, MORE_STEPS)
    if not isinstance(brief.defense.purifier, SteppedPurifier):
        return last.chain
    seconds = timed(chain, brief.images.device, time.perf_counter)
    added = (seconds - last.chain) / (whole - 1)
    return added if added > 0 else seconds / whole


def _measured(brief: Job, whole: int, chains: int) -> Trial:
    """Return a trial of several steps that was repeated for some seconds."""
    enough = TIMED_STEPS.get(brief.images.device.type, TIMED_STEPS["cpu"])
    chain, look, steps = _pieces(brief, chains, min(enough, whole))
    t = alternate({"chain": chain, "look": look}, TIMED_SECONDS, brief.images.device)
    return Trial(chains, t["chain"] / steps, t["look"], None)


def _pieces(
    brief: Job, chains: int, steps: int
) -> tuple[Callable[[], object], Callable[[], object], int]:
    """Return a piece of a chain, a look of the classifier, and how many steps the piece takes.

    The piece of a purifier that cannot be cut into steps is the whole of it.
    """
    images = brief.images[torch.arange(chains) % len(brief.images)]
    keys = chain_keys(0, "forecast", range(chains), range(1))[0]
    noise, purifier = KeyedNoise(keys.to(images.device)), brief.defense.purifier
    one, classify = images.new_ones(()), brief.defense.classify
    cut = isinstance(purifier, SteppedPurifier)

    def chain() -> None:
        with torch.no_grad():
            if isinstance(purifier, SteppedPurifier):
                purifier.advance(purifier.enter(images), noise, range(steps))
            else:
                purifier.purify(images, noise)

    def look() -> Tensor:
        return vjp(lambda x: classify(x).sum(), images, one)

    return chain, look, steps if cut else max(purifier.chain_steps, 1)


def _memory(job: Job, trials: Sequence[Trial], chains: int) -> float:
    """Return the bytes of so many chains: by what the trials took, or else by a rough rule."""
    known = [(t.chains, t.memory) for t in trials if t.memory is not None]
    if len(known) > 1 and known[-1][1] > known[0][1]:
        (few, low), (many, high) = known[0], known[-1]
        return chains * (high - low) / (many - few)
    return chains * job.images[0].numel() * 4.0 * FLOATS_A_PIXEL
