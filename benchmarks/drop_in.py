"""Attack the shipped defense with foolbox and torchattacks, and judge what they find.

The libraries attack a `PurifiedClassifier` as it is. Attacks that average over random draws by
themselves see one purification a call; the others see the mean of `--replicates`. Whatever an
attack believes of its images, the judge projects them and decides on fresh draws:

    python benchmarks/drop_in.py --images 50 --attacks "foolbox LinfPGD" "torchattacks Square"

Without options it runs every attack in full, which takes hours on a CPU.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from common import OnImages, Result, accuracy, main, table
from torch import Tensor

from ebm_defense import PurifiedClassifier, load_data, load_defense
from ebm_defense._torchvision import torchvision
from ebm_defense.attacks import ThreatModel
from ebm_defense.attacks.threat import fraction
from ebm_defense.errors import UsageError
from ebm_defense.eval import judge_images
from ebm_defense.eval.judging.statistics import mean_share

STEPS_ACROSS_EPS = 4  # as published: steps of 2/255 at eps 8/255


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What an attack may spend.

    Attributes:
        threat: what may change.
        steps: gradient steps, of eps/4 where an attack does not choose its own.
        replicates: purifications averaged a step or query.
        queries: of black-box attacks.
        seed: seed of the library's own draws.
    """

    threat: ThreatModel
    steps: int
    replicates: int
    queries: int
    seed: int

    @property
    def step_size(self) -> float:
        """The length of a gradient step."""
        return self.threat.eps / STEPS_ACROSS_EPS


Run = Callable[[PurifiedClassifier, Tensor, Tensor, Budget], Tensor]


class Entry(NamedTuple):
    """A library's attack: its norm, whether it averages draws by itself, and how to run it."""

    norm: str
    averages: bool
    spent: str
    run: Run


def foolbox_pgd(name: str, averages: bool) -> Run:
    """Return foolbox's attack of this name, before its EOT wrapper if it is to average."""

    def run(defense: PurifiedClassifier, images: Tensor, labels: Tensor, budget: Budget) -> Tensor:
        import foolbox

        model: Any = foolbox.PyTorchModel(defense, bounds=(0, 1))
        if averages:
            wrapper = foolbox.models.ExpectationOverTransformationWrapper
            model = wrapper(model, n_steps=budget.replicates)
        attack = getattr(foolbox.attacks, name)(steps=budget.steps, abs_stepsize=budget.step_size)
        _, adversarial, _ = attack(model, images, labels, epsilons=budget.threat.eps)
        return adversarial

    return run


def pgd(defense: PurifiedClassifier, images: Tensor, labels: Tensor, budget: Budget) -> Tensor:
    """Run torchattacks' PGD (Madry et al. 2018)."""
    import torchattacks

    settings = {"eps": budget.threat.eps, "alpha": budget.step_size, "steps": budget.steps}
    return torchattacks.PGD(defense, **settings)(images, labels)


def eot_pgd(defense: PurifiedClassifier, images: Tensor, labels: Tensor, budget: Budget) -> Tensor:
    """Run torchattacks' EOTPGD, which averages gradients."""
    import torchattacks

    settings = {"eps": budget.threat.eps, "alpha": budget.step_size, "steps": budget.steps}
    attack = torchattacks.EOTPGD(defense, eot_iter=budget.replicates, **settings)
    return attack(images, labels)


def square(defense: PurifiedClassifier, images: Tensor, labels: Tensor, budget: Budget) -> Tensor:
    """Run torchattacks' Square (Andriushchenko et al. 2020), a black-box attack."""
    import torchattacks

    settings = {"eps": budget.threat.eps, "n_queries": budget.queries, "seed": budget.seed}
    return torchattacks.Square(defense, **settings)(images, labels)


def autoattack(
    defense: PurifiedClassifier, images: Tensor, labels: Tensor, budget: Budget
) -> Tensor:
    """Run torchattacks' AutoAttack for random defenses: APGD on CE, then APGD on DLR."""
    import torchattacks

    attack = torchattacks.AutoAttack(
        defense, eps=budget.threat.eps, version="rand", n_classes=10, seed=budget.seed
    )
    # Its own default is 10 steps, a tenth of the published attack's.
    for part in attack._autoattack.attacks:
        part.steps, part.eot_iter = budget.steps, budget.replicates
    return attack(images, labels)


ATTACKS: dict[str, Entry] = {
    "foolbox LinfPGD": Entry("Linf", False, "steps", foolbox_pgd("LinfPGD", False)),
    "foolbox L2PGD": Entry("L2", False, "steps", foolbox_pgd("L2PGD", False)),
    "foolbox LinfPGD, EOT wrapper": Entry("Linf", True, "steps", foolbox_pgd("LinfPGD", True)),
    "torchattacks PGD": Entry("Linf", False, "steps", pgd),
    "torchattacks EOTPGD": Entry("Linf", True, "steps", eot_pgd),
    "torchattacks Square": Entry("Linf", False, "queries", square),
    "torchattacks AutoAttack rand": Entry("Linf", True, "steps", autoattack),
}


@dataclass(frozen=True, kw_only=True)
class DropIn(OnImages):
    """Attack a shipped defense with foolbox and torchattacks, and judge what they find."""

    data: str = "fashion-mnist-sample"
    """Data set."""
    images: int = 100
    """How many images, a stratified sample."""
    attacks: tuple[str, ...] = ()
    """Which attacks; all if none is given."""
    eps_linf: float = 8 / 255
    """In [0, 1] pixel units."""
    eps_l2: float = 0.5
    """In [0, 1] pixel units."""
    steps: int = 40
    """Gradient steps."""
    queries: int = 1000
    """Of black-box attacks."""
    replicates: int = 16
    """Purifications a step or query."""
    judge_replicates: int = 150
    """Fresh replicates of a judgement."""
    langevin_steps: int | None = None
    """Instead of the defense's own."""

    def run(self) -> Result:
        """Run the attacks that were asked for, a row for each as it ends."""
        if unknown := [name for name in self.attacks if name not in ATTACKS]:
            raise UsageError(f"unknown attack {unknown[0]!r}; choose among {', '.join(ATTACKS)}.")
        torchvision("datasets")  # which the libraries import, and which does not load everywhere
        names = self.attacks or tuple(ATTACKS)
        text = f"{table(self._rows(names))}\n\n{caption(defense(self, self.replicates), self)}"
        return Result("drop-in", text, self.images * len(names))

    def _rows(self, names: tuple[str, ...]) -> Iterator[dict[str, Any]]:
        images, labels = load_data(self.data, self.split, self.images)
        judged = defense(self, self.replicates)
        natural = judge(judged, images, images, labels, threat(self, "Linf"), self)
        yield row("clean", "", None, natural, 0.0)
        for name in names:
            yield attack(name, images, labels, judged, self)


def attack(
    name: str, images: Tensor, labels: Tensor, judged: PurifiedClassifier, options: DropIn
) -> dict[str, object]:
    """Attack with one library's attack and judge its images."""
    entry = ATTACKS[name]
    limits = threat(options, entry.norm)
    budget = Budget(
        threat=limits,
        steps=options.steps,
        replicates=options.replicates,
        queries=options.queries,
        seed=options.seed,
    )
    attacked = defense(options, 1 if entry.averages else options.replicates)
    begun = time.perf_counter()
    torch.manual_seed(options.seed)  # the libraries draw their starts from the global generator
    adversarial = entry.run(attacked, images, labels, budget).detach()
    seconds = time.perf_counter() - begun
    stands = judge(judged, images, adversarial, labels, limits, options)
    spent = f"{getattr(options, entry.spent)} {entry.spent}"
    return row(name, spent, limits, stands, seconds)


def defense(options: DropIn, replicates: int) -> PurifiedClassifier:
    """Load the shipped defense with as many replicates a call."""
    chain = {} if options.langevin_steps is None else {"steps": options.langevin_steps}
    return load_defense(options.defense, replicates=replicates, seed=options.seed, **chain)


def threat(options: DropIn, norm: str) -> ThreatModel:
    """Return the threat model of one norm."""
    return ThreatModel(norm=norm, eps=options.eps_l2 if norm == "L2" else options.eps_linf)


def judge(
    judged: PurifiedClassifier,
    images: Tensor,
    adversarial: Tensor,
    labels: Tensor,
    limits: ThreatModel,
    options: DropIn,
) -> Tensor:
    """Return the share of predictions that are right, as deployed, `[N]`."""
    found = judge_images(
        judged,
        images,
        adversarial,
        labels,
        threat=limits,
        replicates=options.judge_replicates,
        seed=options.seed,
    )
    return found.stands


def row(
    name: str, spent: str, limits: ThreatModel | None, stands: Tensor, seconds: float
) -> dict[str, Any]:
    """Return one row of the table."""
    return {
        "attack": name,
        "norm": "" if limits is None else limits.norm,
        "eps": "" if limits is None else fraction(limits.eps),
        "budget": spent,
        **accuracy(mean_share(stands)),
        "seconds": f"{seconds:.0f}",
    }


def caption(judged: PurifiedClassifier, options: DropIn) -> str:
    """Return everything else that the numbers depend on."""
    return (
        f"Defense {options.defense} with {judged.purifier.chain_steps} Langevin steps on "
        f"{options.data}; attacks average {options.replicates} replicates a step or query; "
        f"gradient steps of eps/{STEPS_ACROSS_EPS} (AutoAttack chooses its own); judged on "
        f"{options.judge_replicates} fresh replicates; Wilson intervals; seed {options.seed}."
    )


if __name__ == "__main__":
    sys.exit(main(DropIn))
