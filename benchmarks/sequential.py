"""The sequential verdict against a ground truth of thousands of draws, on a shipped defense.

    python benchmarks/sequential.py --images 8       # minutes on one CPU core
    python benchmarks/sequential.py                  # 64 images; about an hour on one CPU core

Images are attacked (protocol quick at eps 0.1), each final image is drawn 2,000 times, and the
votes are kept in the output folder, so that the same command goes on where it was stopped. The
class with most of all votes is the truth. Then each window of H draws is judged sequentially, and
what is printed is how many draws that took, how often it was sure, and how often wrong.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from common import OnImages, Result, main
from torch import Tensor
from torch.nn import functional as F

from ebm_defense import PurifiedClassifier, load_data, load_defense
from ebm_defense.eval import evaluate, get_protocol
from ebm_defense.eval.judging.judge import Stream, draw_logits
from ebm_defense.eval.judging.rules import has_majority
from ebm_defense.eval.judging.sequential import Sequential
from ebm_defense.eval.judging.statistics import share
from ebm_defense.storage.files import atomic, writable_folder

EPS = 0.1


def attacked(defense: PurifiedClassifier, images: Tensor, labels: Tensor, folder: Path) -> Tensor:
    """Return the final images of BPDA+EOT: what broke the defense, or the last iterate."""
    protocol = get_protocol("quick", eps=EPS)
    report = evaluate(defense, images, labels, protocol, seed=0, out=folder / "run")
    (found,) = report.adversarial.values()
    return found


def votes(
    defense: PurifiedClassifier, images: Tensor, draws: int, folder: Path
) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    """Return one vote a draw, `[images, draws]`, from a file an image where there is one."""
    rows = []
    for i, image in enumerate(images):
        file = folder / f"votes-{i:04d}-{draws}.npy"
        if not file.exists():
            logits = draw_logits(defense, image[None], [i], Stream(0, "ground truth", draws))
            with atomic(file) as partial:
                np.save(partial, logits[:, 0].argmax(-1).numpy().astype(np.uint8))
            print(f"image {i + 1} of {len(images)}", file=sys.stderr)
        rows.append(np.load(file))
    return np.stack(rows)


def replay(found: Tensor, labels: Tensor, rule: Sequential, most: int) -> tuple[Tensor, ...]:
    """Judge every window of `most` votes; return stands, decided and draws `[windows, b]`."""
    classes = int(max(found.max(), labels.max())) + 1
    looks = torch.ones(len(labels), dtype=torch.int64)
    rulings = [
        rule.judge(
            lambda some, numbers, window=window: F.one_hot(
                window[some, numbers.start : numbers.stop].T, classes
            ).float(),
            labels,
            lambda logits: logits.mean(0),
            most=most,
            looks=looks,
        )
        for window in found.split(most, dim=1)
        if window.shape[1] == most
    ]
    parts = zip(*(r[:3] for r in rulings), strict=True)
    return tuple(torch.stack(list(part)) for part in parts)


def summary(found: Tensor, labels: Tensor, rule: Sequential, most: int) -> str:
    """Return what the replay showed, in sentences."""
    counts = F.one_hot(found, int(max(found.max(), labels.max())) + 1).sum(1)
    truth = has_majority(counts, labels)
    stands, decided, draws = replay(found, labels, rule, most)
    agree = (stands == truth)[decided]
    wrong = share(int((~agree).sum()), len(agree))
    top = counts.double().topk(2, dim=1).values / counts.sum(1, keepdim=True)
    return (
        f"- {len(labels)} images, {found.shape[1]} draws each; the label has the majority on "
        f"{int(truth.sum())}\n"
        f"- closest elections: {sorted((top[:, 0] - top[:, 1]).tolist())[:5]} apart\n"
        f"- sequential test at alpha {rule.alpha:g}, {decided.numel()} verdicts on at most {most} "
        f"draws\n"
        f"- draws a verdict: {draws.double().mean():.1f} in the mean, "
        f"{draws.double().median():.0f} in the median, {most} for the fixed rule\n"
        f"- undecided: {int((~decided).sum())} ({1 - decided.double().mean():.1%})\n"
        f"- wrong of {len(agree)} decided: {wrong.right} "
        f"({wrong.value:.2%}, 95% interval {wrong.low:.2%} to {wrong.high:.2%})\n"
        f"- agreement of all, undecided by majority: {(stands == truth).double().mean():.2%}"
    )


@dataclass(frozen=True, kw_only=True)
class Truth(OnImages):
    """Hold the sequential verdict against a ground truth of thousands of draws."""

    split: str = "val"
    """train, val or test."""
    draws: int = 2000
    """Draws of each image, whose majority is the truth."""
    most: int = 150
    """The largest number of draws of a verdict."""
    alpha: float = Sequential().alpha
    """Error level of the verdict."""

    def run(self) -> Result:
        """Attack, draw, judge every window of draws."""
        name = f"sequential-{self.defense}-{self.split}"
        folder = writable_folder(self.out / f"{name}-{self.images}")
        defense = load_defense(self.defense, seed=0)
        images, labels = load_data(self.data, self.split, self.images)
        final = attacked(defense, images, labels, folder)
        found = torch.from_numpy(votes(defense, final, self.draws, folder).astype(np.int64))
        text = summary(found, labels, Sequential(alpha=self.alpha), self.most)
        return Result(name, text, self.images * self.draws)


if __name__ == "__main__":
    sys.exit(main(Truth))
