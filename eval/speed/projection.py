"""What a whole evaluation by the published protocol would take, from what was measured."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ebm_defense.classifiers import WideResNet, WideResNetSettings
from ebm_defense.energies.conv import ConvEnergySettings, channels_last
from ebm_defense.engine.derivatives import vjp
from ebm_defense.eval.speed.roofline import LAYOUTS
from ebm_defense.eval.speed.throughput import precisions_here
from ebm_defense.runtime.packing import Packing
from ebm_defense.runtime.timing import Clock, alternate

CLASSIFIERS = {
    3: WideResNetSettings(),
    1: WideResNetSettings(channels=1, depth=10, widen=2),
}
"""By channels, the classifier behind a layout's energy: the published one, and the shipped one."""
PASSED_AT_ONCE = {"cpu": 16, "cuda": 512}


class Passes(NamedTuple):
    """Seconds of the classifier an image: with its gradient, as attacks look, and without."""

    look: float
    verdict: float


def measure_passes(
    layout: str, seconds: float, device: torch.device, clock: Clock = time.perf_counter
) -> dict[bool, Passes]:
    """Measure the classifier behind a layout's energy: as published, and (False) as ours is run.

    Ours is channels_last and passes verdicts in the fastest native precision; looks are fp32.
    """
    settings = LAYOUTS[layout]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        published = WideResNet(CLASSIFIERS[settings.channels]).to(device).eval()
    ours = channels_last(copy.deepcopy(published).requires_grad_(False))
    packing = Packing(PASSED_AT_ONCE.get(device.type, PASSED_AT_ONCE["cpu"]))
    for attempt in packing.tries():
        with attempt:
            return _measured(published, ours, packing.chains, settings, seconds, device, clock)
    raise AssertionError("tries end by an error or a result")


def _measured(
    published: nn.Module,
    ours: nn.Module,
    count: int,
    settings: ConvEnergySettings,
    seconds: float,
    device: torch.device,
    clock: Clock,
) -> dict[bool, Passes]:
    """Measure both classifiers on so many images at a time."""
    size = settings.image_size
    images = torch.zeros((count, settings.channels, size, size), device=device)
    native = precisions_here(device)[-1] == "bf16"
    verdicts = copy.deepcopy(ours).bfloat16() if native else ours
    like = next(verdicts.parameters()).dtype
    one = images.new_ones(())
    t = alternate(
        {
            "published look": lambda: vjp(lambda x: published(x).sum(), images, one),
            "published verdict": lambda: _one_way(published, images),
            "look": lambda: vjp(lambda x: ours(x).sum(), images, one),
            "verdict": lambda: _one_way(verdicts, images.to(like)),
        },
        seconds, device, clock,
    )  # fmt: skip
    return {
        True: Passes(t["published look"] / count, t["published verdict"] / count),
        False: Passes(t["look"] / count, t["verdict"] / count),
    }


@torch.no_grad()
def _one_way(classifier: nn.Module, images: Tensor) -> Tensor:
    found: Tensor = classifier(images)
    return found


@dataclass(frozen=True, kw_only=True)
class PublishedCost:
    """What a whole evaluation by the published protocol costs.

    Attributes:
        looks: gradients and checks of one image: 50 steps, the start and the clean image.
        replicates: chains a look.
        steps: K.
        verification: chains of one verification.
        verifications: how many an image needs on average, an assumption.
        robust: share of images that are never broken, an assumption.
        broken_after: share of the looks after which a broken image falls, an assumption.
    """

    looks: int = 52
    replicates: int = 15
    steps: int = 1500
    verification: int = 150
    verifications: float = 2.0
    robust: float = 0.55
    broken_after: float = 0.25

    def chains(self, *, drop_broken: bool) -> tuple[float, float]:
        """Return the chains of one image that attacks look through, and those of verdicts.

        Broken images go on unless they are dropped.
        """
        share = self.robust + (1 - self.robust) * self.broken_after if drop_broken else 1.0
        return self.looks * self.replicates * share, self.verification * self.verifications

    def seconds(self, rate: float, passes: Passes, *, drop_broken: bool) -> float:
        """Return the time of one image at so many chain-steps a second and such passes."""
        looks, verdicts = self.chains(drop_broken=drop_broken)
        chains = self.steps * (looks + verdicts) / rate
        return chains + looks * passes.look + verdicts * passes.verdict
