"""Certify this machine's GPU, or say what of it cannot be shown here; see gpu_certify.sh."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from common import ROOT, Options, Result, main

from ebm_defense import load_data, load_defense
from ebm_defense.energies.conv import ConvEnergy, channels_last
from ebm_defense.engine import cuda_graphs, energy_and_gradient, prepare
from ebm_defense.errors import UsageError
from ebm_defense.eval.speed.projection import PublishedCost, measure_passes
from ebm_defense.eval.speed.roofline import LAYOUTS, Ceilings, measure_ceilings
from ebm_defense.eval.speed.throughput import (
    COMPILED,
    PUBLISHED,
    competitors,
    forward_chain,
    precisions_here,
    start_of,
    steps_of,
)
from ebm_defense.noise import chain_keys
from ebm_defense.precision.devices import device_name
from ebm_defense.runtime.timing import alternate, timed

BATCHES, SECONDS = (150, 2400, 9600), 3.0
LIMITS = {"fp32": 1e-5, "tf32": 2e-3}
"""By precision, the largest relative error of ∇U of the published network."""
BF16_LIMIT = 1.5
"""The largest error of ∇U in bf16, in errors of plain autograd in bf16: both round some activations
across the corners of LeakyReLU, which makes up to 13% of a gradient of the shipped energies."""
FAILED: list[str] = []


class Outcome(NamedTuple):
    """What a step showed: whether it passed, None where it cannot be done here, and a line."""

    passed: bool | None
    line: str

    @property
    def word(self) -> str:
        """PASS, FAIL or CANNOT."""
        return {True: "PASS", False: "FAIL", None: "CANNOT"}[self.passed]


class Here(NamedTuple):
    """Where it is shown."""

    device: torch.device
    folder: Path

    @property
    def gpu(self) -> bool:
        """Whether it is a GPU."""
        return self.device.type == "cuda"


NO_GPU = Outcome(None, "there is no GPU here")


def command(*words: object, seconds: float = 300.0) -> subprocess.CompletedProcess[str]:
    """Run ebm-defense's command line in a process of its own."""
    line = [sys.executable, "-m", "ebm_defense.commands.main", *map(str, words)]
    return subprocess.run(
        line, cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False
    )


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    """Return what a process said last."""
    said = (done.stdout + "\n" + done.stderr).strip().splitlines()
    return said[-1].strip() if said else f"status {done.returncode}, nothing said"


def checks(here: Here) -> Outcome:
    """Doctor's self-check of every device."""
    page = here.folder / "doctor.md"
    done = command("doctor", "--again", "--out", page)
    rows = re.findall(r"\| (passes|FAILS) \|", done.stdout)
    failing = f", {rows.count('FAILS')} failing" if "FAILS" in rows else ""
    return Outcome(done.returncode == 0 and bool(rows), f"{len(rows)} checks{failing}")


def tests(here: Here) -> Outcome:
    """The tests that a GPU alone can run."""
    if not here.gpu:
        return NO_GPU
    words = ["-m", "pytest", "-q", "tests/engine/test_cuda.py", "tests/engine/test_triton.py"]
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    return Outcome(done.returncode == 0, last_line(done))


def gradients(here: Here) -> Outcome:
    """∇U of the published network against float64 autograd on the CPU."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(8, 3, 32, 32, generator=generator).mul_(2).sub_(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        energy = ConvEnergy().requires_grad_(False)
    exact = energy_and_gradient(energy.double(), x.double())[1]
    energy, x = channels_last(energy.float().to(here.device)), x.to(here.device)
    errors = {p: _off(prepare(energy, x, p)(x), exact) for p in precisions_here(here.device)}
    passed = all(errors[p] <= limit for p, limit in LIMITS.items() if p in errors)
    said = [
        f"{p} {errors[p]:.1e} (at most {limit:g})" for p, limit in LIMITS.items() if p in errors
    ]
    if "bf16" in errors:
        ratio = errors["bf16"] / _off(prepare(energy, x, "bf16", engine="autograd")(x), exact)
        passed &= ratio <= BF16_LIMIT
        said.append(f"bf16 {ratio:.2f} of autograd's (at most {BF16_LIMIT:g})")
    return Outcome(passed, ", ".join(said))


def _off(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.cpu().double() - exact).norm() / exact.norm())


def graphs(here: Here) -> Outcome:
    """Captured graphs against single steps, at the published 150 chains."""
    if not here.gpu:
        return NO_GPU
    start = start_of(LAYOUTS["cifar10"], 150, cuda_graphs.PAYS, here.device)
    energy = channels_last(ConvEnergy().to(here.device).requires_grad_(False))
    run = forward_chain(energy, start, "bf16")
    run()
    graphed = sorted(timed(run, here.device, time.perf_counter) for _ in range(5))[1]
    captured = bool(cuda_graphs.CAPTURES.kept)
    with cuda_graphs.CAPTURES.lock:  # in use elsewhere, as it were: steps are taken singly
        single = sorted(timed(run, here.device, time.perf_counter) for _ in range(5))[1]
    ratio = single / graphed
    return Outcome(captured and ratio >= 1.5, f"{ratio:.2f}x single steps (at least 1.5x)")


def speed(here: Here) -> Outcome:
    """Chains a second beside the published loop, eager and compiled, and of the roofline."""
    layout = "cifar10" if here.gpu else "fashion-mnist-16"
    batches = BATCHES if here.gpu else (10,)
    ceilings = [measure_ceilings(p, 1.0, here.device) for p in precisions_here(here.device)]
    said, passed, rates = [], True, {}
    for batch in batches:
        rates, ratios, roofline = _race(layout, batch, ceilings, here)
        passed &= ratios[PUBLISHED] >= 2.0 or not here.gpu
        beside = ", ".join(f"{ratio:.2f}x {name}" for name, ratio in ratios.items())
        said.append(f"{batch} chains {beside}, {roofline:.0%} of the roofline")
    best = f"; {max(rates.values()):,.0f} steps/s" if rates else ""
    wanted = " (bf16 at least 2x published)" if here.gpu else " (no criterion without a GPU)"
    return Outcome(passed, f"{layout}: {'; '.join(said)}{best}{wanted}")


def _race(
    layout: str, batch: int, ceilings: list[Ceilings], here: Here
) -> tuple[dict[str, float], dict[str, float], float]:
    """Return rates by name, ours over each published loop, and ours as a share of the roofline."""
    start = start_of(LAYOUTS[layout], batch, steps_of(batch, here.device), here.device)
    found = competitors(LAYOUTS[layout], start, ceilings, compiled=here.gpu)
    fastest = ceilings[-1].precision
    names = [n for n in found if n.startswith(PUBLISHED)] + [fastest]
    times = alternate({n: found[n].run for n in names}, SECONDS, here.device)
    steps = batch * start.chain.steps
    ratios = {n: times[n] / times[fastest] for n in names if n in (PUBLISHED, COMPILED)}
    roofline = steps / times[fastest] * found[fastest].least_seconds
    return {n: steps / t for n, t in times.items()}, ratios, roofline


def verdicts(here: Here) -> Outcome:
    """Classes named on the GPU and on the CPU of the same images with the same noise."""
    if not here.gpu:
        return NO_GPU
    images, _ = load_data("fashion-mnist-sample", limit=128)
    keys = chain_keys(0, "certify", range(128), range(8))
    named = []
    for device in (torch.device("cpu"), here.device):
        defense = load_defense("fashion-mnist").to(device)
        logits = defense.verdict_logits(images.to(device), keys)
        named.append(defense.combine(logits).argmax(-1).cpu())
    share = float((named[0] == named[1]).float().mean())
    return Outcome(share >= 0.95, f"{share:.1%} of 128 equal (at least 95%)")


CAPPED = """
import logging, sys, torch
from ebm_defense import load_data, load_defense
logging.basicConfig(stream=sys.stdout, format="%(message)s")
total = torch.cuda.get_device_properties(0).total_memory
torch.cuda.set_per_process_memory_fraction(min(1.0, float(sys.argv[1]) * 2**20 / total))
images, _ = load_data("fashion-mnist-sample", limit=512)
defense = load_defense("fashion-mnist", steps=5, replicates=16, max_chains=8192, seed=0).cuda()
print("logits", tuple(defense(images.cuda()).shape), "chains", defense.max_chains)
"""


def memory(here: Here) -> Outcome:
    """Chains halved under a cap of 300 MiB, and the work done all the same."""
    if not here.gpu:
        return NO_GPU
    words = [sys.executable, "-c", CAPPED, "300"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    found = re.search(r"logits \(512, 10\) chains (\d+)", done.stdout)
    halved = found is not None and int(found[1]) < 8192
    return Outcome(halved, last_line(done))


def _evaluation(here: Here, out: Path) -> list[object]:
    settings = {
        "defense": "fashion-mnist", "data": "fashion-mnist-sample", "images": 64, "steps": 2,
        "replicates": 2, "judge-replicates": 16, "langevin-steps": 5,
        "device": here.device.type, "out": out,
    }  # fmt: skip
    return ["evaluate", *(word for k, v in settings.items() for word in (f"--{k}", v))]


def kill(here: Here) -> Outcome:
    """A run killed on its way and resumed, against one that was not."""
    whole, cut = here.folder / "whole", here.folder / "cut"
    done = command(*_evaluation(here, whole))
    if done.returncode:
        return Outcome(False, last_line(done))
    line = [sys.executable, "-m", "ebm_defense.commands.main", *map(str, _evaluation(here, cut))]
    victim = subprocess.Popen(
        line, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    while victim.poll() is None and not (cut / "settings.toml").exists():
        time.sleep(0.05)
    victim.send_signal(signal.SIGKILL)
    status = victim.wait()
    done = command(*_evaluation(here, cut))
    if done.returncode:
        return Outcome(False, last_line(done))
    same = (whole / "records.csv").read_bytes() == (cut / "records.csv").read_bytes()
    killed = "killed" if status == -signal.SIGKILL else "ended before it was killed"
    return Outcome(same, f"{killed}, resumed; records are {'the same' if same else 'NOT the same'}")


def torchrun(here: Here) -> Outcome:
    """Torchrun's processes at one run; one more than there are GPUs is refused in a sentence."""
    count = min(2, torch.cuda.device_count()) if here.gpu else 2
    start = ["-m", "torch.distributed.run", "--nproc-per-node"]

    def go(processes: int, name: str) -> subprocess.CompletedProcess[str]:
        words = ["-m", "ebm_defense.commands.main", *_evaluation(here, here.folder / name)]
        line = [sys.executable, *start, str(processes), *map(str, words)]
        return subprocess.run(
            line, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
        )

    done = go(count, "torchrun")
    if done.returncode:
        return Outcome(False, last_line(done))
    if not here.gpu:
        return Outcome(True, f"{count} processes on the CPU; ranks beyond GPUs need a GPU")
    refused = "GPUs; start at most as many" in go(torch.cuda.device_count() + 1, "many").stderr
    return Outcome(
        refused, f"{count} processes; one too many is {'' if refused else 'NOT '}refused"
    )


def learning(here: Here) -> Outcome:
    """Updates of maximum-likelihood learning, which may not diverge."""
    updates = 200 if here.gpu else 5
    out = here.folder / "learned"
    words = {
        "out": out, "data": "digits", "width": 16, "updates": updates, "batch": 100, "bank": 1000,
        "device": here.device.type, "chain-lengths": 100, "pictures-every": updates,
    }  # fmt: skip
    start = time.perf_counter()
    done = command("train-ebm", *(word for k, v in words.items() for word in (f"--{k}", v)))
    if done.returncode:
        return Outcome(False, last_line(done))
    seconds = time.perf_counter() - start
    history = pd.read_csv(out / "history.csv")
    finite = bool(history.notna().all(axis=None)) and len(history) == updates
    return Outcome(finite, f"{updates} updates in {seconds:.0f} s, start and pictures included")


def hours(here: Here) -> Outcome:
    """The projected time of the published protocol on 10,000 CIFAR-10 images."""
    if not here.gpu:
        return NO_GPU
    ceilings = [measure_ceilings(p, 1.0, here.device) for p in precisions_here(here.device)]
    rates, _, _ = _race("cifar10", BATCHES[1], ceilings, here)
    rate = rates[ceilings[-1].precision]
    passes = measure_passes("cifar10", SECONDS, here.device)[False]
    cost = PublishedCost()
    each = [10_000 * cost.seconds(rate, passes, drop_broken=drop) / 3600 for drop in (False, True)]
    return Outcome(True, f"{each[0]:.0f} h to the end, {each[1]:.0f} h with broken images dropped")


SANITIZED = """
import torch
from ebm_defense import ConvEnergy, run_chain
from ebm_defense.engine import cuda_graphs
from ebm_defense.langevin import LangevinSettings
from ebm_defense.noise import KeyedNoise
cuda_graphs.PAYS = 1
for count in (3, 5):
    x, keys = torch.zeros(count, 3, 32, 32).cuda(), torch.arange(count).cuda()
    for precision in ("fp32", "bf16"):
        run_chain(x, KeyedNoise(keys), energy=ConvEnergy().cuda(), precision=precision,
                  settings=LangevinSettings(steps=45))
torch.cuda.synchronize()
"""


def sanitizer(here: Here) -> Outcome:
    """compute-sanitizer's memcheck of short chains by graphs."""
    tool = shutil.which("compute-sanitizer")
    if not here.gpu or tool is None:
        return NO_GPU if not here.gpu else Outcome(None, "compute-sanitizer is not installed")
    words = [tool, "--error-exitcode", "9", sys.executable, "-c", SANITIZED]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=400, check=False)
    return Outcome(done.returncode == 0, last_line(done))


STEPS: Mapping[str, Callable[[Here], Outcome]] = {
    step.__name__: step
    for step in (
        checks, tests, gradients, graphs, speed, verdicts, memory, kill, torchrun, learning, hours,
        sanitizer,
    )
}  # fmt: skip
"""In their order, by name."""


def attempt(step: Callable[[Here], Outcome], here: Here) -> Outcome:
    """Take a step; what it raises is its failure."""
    try:
        return step(here)
    except Exception as error:  # a step that breaks must not cost the others
        reason = str(error).partition("\n")[0]
        return Outcome(False, f"{type(error).__name__}: {reason}")


@dataclass(frozen=True, kw_only=True)
class Certify(Options):
    """Check, time and break this machine's GPU on purpose, and write what it showed."""

    only: str = ""
    """Steps by name, with commas between; all if empty."""
    cpu: bool = False
    """Leave a GPU alone: show what runs without one."""

    def run(self) -> Result:
        """Take every step."""
        names = [n.strip() for n in self.only.split(",") if n.strip()] or list(STEPS)
        for name in names:
            if name not in STEPS:
                raise UsageError(f"unknown step {name!r}; choose among {', '.join(STEPS)}.")
        use = torch.cuda.is_available() and not self.cpu
        device = torch.device("cuda", 0) if use else torch.device("cpu")
        found: dict[str, Outcome] = {}
        with tempfile.TemporaryDirectory() as folder:
            for name in names:
                begun = time.perf_counter()
                found[name] = attempt(STEPS[name], Here(device, Path(folder)))
                taken = time.perf_counter() - begun
                print(
                    f"{found[name].word:<6} {name}: {found[name].line} [{taken:.0f} s]", flush=True
                )
        FAILED.extend(name for name, outcome in found.items() if outcome.passed is False)
        shown = sum(outcome.passed is True for outcome in found.values())
        return Result(f"gpu-certificate-{slug(device)}", page(device, found), shown)


def slug(device: torch.device) -> str:
    """Return a device's name as part of a file's."""
    return re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")


def page(device: torch.device, found: dict[str, Outcome]) -> str:
    """Return the page of what was shown."""
    rows = [
        f"| {name} | {outcome.word} | {(STEPS[name].__doc__ or '').strip()} | {outcome.line} |"
        for name, outcome in found.items()
    ]
    counts = {w: sum(o.word == w for o in found.values()) for w in ("PASS", "FAIL", "CANNOT")}
    said = ", ".join(f"{count} {word}" for word, count in counts.items())
    head = ["| step | | what it shows | what it showed |", "|:--|:--|:--|:--|"]
    return "\n".join([f"# {device_name(device)}: {said}\n", *head, *rows])


if __name__ == "__main__":
    sys.exit(main(Certify) or int(bool(FAILED)))
