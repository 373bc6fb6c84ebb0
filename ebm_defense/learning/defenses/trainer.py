"""Learning a whole defense against attacks on its input, through every step of its chain."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ebm_defense.data import Images
from ebm_defense.errors import UsageError
from ebm_defense.learning.batches import Batches, generator_of
from ebm_defense.learning.checkpoints import refuse_another
from ebm_defense.learning.defenses.chain import LearnedChain
from ebm_defense.learning.defenses.objectives import Loss
from ebm_defense.learning.defenses.recipe import DefenseRecipe
from ebm_defense.learning.energies.likelihood import LikelihoodTerm
from ebm_defense.learning.energies.robust import barron
from ebm_defense.learning.energies.trainer import DivergedError
from ebm_defense.learning.parallel import Team
from ebm_defense.noise import GeneratorNoise, derive_seed
from ebm_defense.precision.names import resolve_precision
from ebm_defense.purifiers import Purifier
from ebm_defense.storage.files import load_plain, save_state

MOST_SKIPPED = 10
VALIDATION_BATCH = 250

Predict = Callable[[Tensor], Tensor]
"""Images `[b, C, H, W]` in [0, 1] to mean logits `[b, classes]`, on fresh noise at every call."""


class Defended(NamedTuple):
    """Mean logits `[b, classes]` of images, and the images purified, `[r, b, C, H, W]`."""

    logits: Tensor
    purified: Tensor


class Adversary(Protocol):
    """What perturbs the input of a defense that learns."""

    def __call__(
        self,
        predict: Predict,
        images: Tensor,
        labels: Tensor,
        *,
        eps: float,
        steps: int,
        loss: Loss,
        generator: torch.Generator,
    ) -> Tensor:
        """Return `images` `[b, C, H, W]` perturbed within eps and [0, 1] to raise the loss."""
        ...


class Progress(NamedTuple):
    """What a validation found: `update` updates are done; accuracies lie in [0, 1].

    Attributes:
        update: updates done.
        loss: mean training loss since the last validation.
        attacked: training accuracy under the training's attack, likewise.
        clean, robust: of the averaged weights on the validation images, `robust` under attack.
        skipped: updates left out for a gradient that was not finite.
    """

    update: int
    loss: float
    attacked: float
    clean: float
    robust: float
    skipped: int


class DefenseTrainer:
    """Learns a purifier, a classifier or both in place; iterate `run()`, look at each `Progress`.

    Every draw is a function of (seed, update, rank), so a run goes on exactly where it stopped.

    Args:
        purifier: one that torch differentiates: a `LearnedChain`, noise, or none.
        classifiers: on [0, 1] images; several, of which each update takes one, where the energy
            alone learns.
        batches: the training images.
        validation: images that choose the best weights, those most robust.
        recipe: all settings.
        adversary: what perturbs the images.
        precision: of inner activations, one of `langevin.PRECISIONS`; "fastest" is bf16 where it
            is native, unchecked: the validation shows what it costs.
        team: the processes that learn together.

    Raises:
        UsageError: a recipe that does not fit the parts.
    """

    def __init__(
        self,
        purifier: Purifier,
        classifiers: Sequence[nn.Module],
        batches: Batches,
        validation: Images,
        recipe: DefenseRecipe,
        adversary: Adversary,
        *,
        precision: str = "fastest",
        team: Team | None = None,
    ) -> None:
        _refuse_misfits(purifier, classifiers, recipe)
        self.purifier, self.classifiers, self.recipe = purifier, list(classifiers), recipe
        self.batches, self.validation, self.adversary = batches, validation, adversary
        self.team = team or Team()
        self.device = next(classifiers[0].parameters()).device
        self.bf16 = resolve_precision(precision, self.device, torch.float32) == "bf16"
        self.learned = self._learned()
        self.averaged: Any = AveragedModel(
            self.learned, multi_avg_fn=rising_average(recipe.average), use_buffers=True
        )
        self.optimiser = torch.optim.AdamW(self._groups(), betas=(0.9, 0.99))
        self.likelihood = self._likelihood()
        self.history: list[Progress] = []
        self.best: dict[str, Tensor] = copy.deepcopy(self.averaged.module.state_dict())
        self.done, self.skipped, self.in_a_row = 0, 0, 0
        self.sums = torch.zeros(3, dtype=torch.float64)

    def _learned(self) -> nn.ModuleDict:
        """Freeze everything, then name what learns."""
        for module in (self.purifier, *self.classifiers):
            module.eval()
        learns_chain = self.recipe.learn != "classifier"
        learns_classifier = self.recipe.learn != "energy"
        for classifier in self.classifiers:
            classifier.requires_grad_(learns_classifier)
        if not learns_chain:
            self.purifier.requires_grad_(False)
        elif isinstance(self.purifier, LearnedChain):
            self.purifier.energy.requires_grad_(True)
        parts: dict[str, nn.Module] = {"purifier": self.purifier} if learns_chain else {}
        if learns_classifier:
            parts["classifier"] = self.classifiers[0]
        return nn.ModuleDict(parts)

    def _groups(self) -> list[dict[str, Any]]:
        r = self.recipe
        rates = {"purifier": (r.lr, 0.0), "classifier": (r.classifier_lr, r.weight_decay)}
        return [
            {
                "params": [p for p in part.parameters() if p.requires_grad],
                "lr": rates[name][0],
                "top": rates[name][0],
                "weight_decay": rates[name][1],
            }
            for name, part in self.learned.items()
        ]

    def _likelihood(self) -> LikelihoodTerm | None:
        if self.recipe.likelihood is None:
            return None
        images, seed = self.batches.data.images, derive_seed(self.recipe.seed, "likelihood")
        return LikelihoodTerm(self.recipe.likelihood, images, seed, self.team)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What learns."""
        return [p for group in self.optimiser.param_groups for p in group["params"]]

    def run(self) -> Iterator[Progress]:
        """Learn until the recipe's updates are done, yielding after each validation.

        Raises:
            DivergedError: ten gradients in a row that were not finite.
        """
        every = self.recipe.validate_every or self.batches.an_epoch
        while self.done < self.recipe.updates:
            self.step()
            if self.done % every == 0 or self.done == self.recipe.updates:
                yield self._validate()

    def step(self) -> None:
        """Take one update."""
        r, generator = self.recipe, self._generator("update")
        images, labels = self._batch()
        pick = int(torch.randint(len(self.classifiers), (1,), generator=generator))
        defended = self._defended(self.purifier, self.classifiers[pick], r.draws, generator)
        attacked = self.adversary(
            lambda x: defended(x).logits, images, labels,
            eps=r.eps_at(self.done), steps=r.steps_at(self.done),
            loss=r.objective.attacked, generator=generator,
        ) if r.eps else images  # fmt: skip
        self.learned.train()
        found = defended(torch.cat([images, attacked]) if r.objective.needs_clean else attacked)
        logits = found.logits[-len(images) :]
        clean = found.logits[: len(images)] if r.objective.needs_clean else None
        loss = r.objective(clean, logits, labels)
        if r.reconstruction:
            apart = found.purified[:, -len(images) :] - images
            loss = loss + r.reconstruction * self._apart(apart)
        if self.likelihood is not None:
            assert isinstance(self.purifier, LearnedChain)
            chain = self.purifier
            loss = loss + self.likelihood(chain.energy, chain.settings, self.done)
        right = logits.argmax(1).eq(labels).double().mean()
        self._descend(loss)
        self.learned.eval()
        self.done += 1
        self.sums += torch.tensor([float(loss.detach()), float(right), 1.0], dtype=torch.float64)

    def _apart(self, apart: Tensor) -> Tensor:
        """Return the mean of 2c²·ρ(apart), which is the mean square for the shape 2."""
        shape, scale = self.recipe.reconstruction_shape, self.recipe.reconstruction_scale
        return 2.0 * scale**2 * barron(apart, shape, scale).mean()

    def _descend(self, loss: Tensor) -> None:
        for group in self.optimiser.param_groups:
            group["lr"] = group["top"] * self.recipe.rate(self.done)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.team.average(p.grad for p in self.parameters if p.grad is not None)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.recipe.clip)
        if not bool(norm.isfinite()):
            self._skip()
            return
        self.in_a_row = 0
        self.optimiser.step()
        self.averaged.update_parameters(self.learned)

    def _skip(self) -> None:
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        if self.in_a_row >= MOST_SKIPPED:
            raise DivergedError(
                f"learning diverged at update {self.done + 1}: {MOST_SKIPPED} gradients in a row "
                "were not finite; lower the learning rate and resume from the last checkpoint."
            )

    def _batch(self) -> Images:
        images, labels = self.batches.at(self.done)
        rows = self.team.share(torch.arange(len(labels)))
        return Images(images[rows].to(self.device), labels[rows].to(self.device))

    def _generator(self, purpose: str) -> torch.Generator:
        return generator_of(self.recipe.seed, f"{purpose} {self.done} {self.team.rank}")

    def _defended(
        self, purifier: Purifier, classifier: nn.Module, draws: int, generator: torch.Generator
    ) -> Callable[[Tensor], Defended]:
        noise = GeneratorNoise(generator)
        draws = draws if purifier.stochastic else 1

        def defended(images: Tensor) -> Defended:
            purified = purifier.purify(images.repeat(draws, 1, 1, 1), noise)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                logits = classifier(purified.contiguous(memory_format=torch.channels_last))
            mean = logits.float().view(draws, len(images), -1).mean(0)
            return Defended(mean, purified.view(draws, *images.shape))

        return defended

    def kept(self, state: dict[str, Tensor] | None = None) -> tuple[Purifier, nn.Module]:
        """Return purifier and first classifier of the best weights, or of a `state`, as copies."""
        module = copy.deepcopy(self.averaged.module)
        module.load_state_dict(self.best if state is None else state)
        parts: dict[str, Any] = dict(module.eval().items())
        own: dict[str, Any] = {"purifier": self.purifier, "classifier": self.classifiers[0]}
        found = {k: parts[k] if k in parts else copy.deepcopy(v) for k, v in own.items()}
        return found["purifier"], found["classifier"]

    def _validate(self) -> Progress:
        self.team.average_buffers(self.learned)
        self.team.average_buffers(self.averaged)
        clean, robust = self._accuracies()
        loss, attacked = (self.sums[:2] / self.sums[2]).tolist()
        self.sums.zero_()
        if robust >= max((p.robust for p in self.history), default=-1.0):
            self.best = copy.deepcopy(self.averaged.module.state_dict())
        found = Progress(self.done, loss, attacked, clean, robust, self.skipped)
        self.history.append(found)
        return found

    def _accuracies(self) -> tuple[float, float]:
        """Return clean and robust accuracy of the averaged weights, by the same noise each time."""
        r, generator = self.recipe, generator_of(self.recipe.seed, f"validation {self.team.rank}")
        parts = self.kept(self.averaged.module.state_dict())
        attack, judge = (
            self._defended(*parts, draws, generator) for draws in (r.draws, r.validation_draws)
        )
        right = torch.zeros(3, dtype=torch.float64)
        rows = self.team.share(torch.arange(len(self.validation.labels)))
        for some in rows.split(VALIDATION_BATCH):
            images, labels = (t[some].to(self.device) for t in self.validation)
            attacked = self.adversary(
                lambda x: attack(x).logits, images, labels,
                eps=r.eps, steps=r.validation_steps, loss=r.objective.attacked,
                generator=generator,
            ) if r.eps else images  # fmt: skip
            for i, batch in enumerate((images, attacked)):
                with torch.no_grad():
                    right[i] += float(judge(batch).logits.argmax(1).eq(labels).sum())
            right[2] += len(some)
        self.team.average([right])
        clean, robust = (right[:2] / right[2].clamp_min(1.0)).tolist()
        return clean, min(clean, robust)

    def save(self, path: Path) -> None:
        """Write everything that `load` needs to go on exactly, atomically.

        In a team everyone calls it; the leader writes.
        """
        state: dict[str, Any] = {
            "about": self._about(),
            "learned": self.learned.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "best": self.best,
            "sums": self.sums,
            "counts": torch.tensor([self.done, self.skipped, self.in_a_row]),
            "history": torch.tensor([list(p) for p in self.history], dtype=torch.float64),
        }
        if self.likelihood is not None:
            state["likelihood"] = self.likelihood.start.state()
        if self.team.leads:
            save_state(path, state)

    def _about(self) -> dict[str, Any]:
        return {"seed": self.recipe.seed, "learn": self.recipe.learn}

    def load(self, path: Path) -> None:
        """Go on from a checkpoint of `save`.

        Raises:
            UsageError: a missing or damaged checkpoint, or one of other networks.
        """
        state = load_plain(path)
        refuse_another(state, self._about(), path)
        try:
            self.learned.load_state_dict(state["learned"])
            self.averaged.load_state_dict(state["averaged"])
            self.optimiser.load_state_dict(state["optimiser"])
            self.best, self.sums = state["best"], state["sums"]
            self.done, self.skipped, self.in_a_row = state["counts"].tolist()
            rows = state["history"].tolist()
            self.history = [Progress(int(u), a, b, c, d, int(n)) for u, a, b, c, d, n in rows]
            if self.likelihood is not None:
                self.likelihood.start.restore(state["likelihood"])
        except (IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise UsageError(f"{path} is no checkpoint of these networks: {error}") from error


def rising_average(decay: float) -> Callable[..., None]:
    """Return an exponential average whose decay rises to `decay`, so that it forgets the start.

    After n updates the decay is min(decay, n/(9 + n)).
    """

    def update(averaged: Any, current: Any, count: Any) -> None:
        n = int(count)
        get_ema_multi_avg_fn(min(decay, n / (9 + n)))(averaged, current, count)

    return update


def _refuse_misfits(
    purifier: Purifier, classifiers: Sequence[nn.Module], recipe: DefenseRecipe
) -> None:
    if not classifiers or (len(classifiers) > 1 and recipe.learn != "energy"):
        raise UsageError("one classifier learns; several may stand, unlearned, behind an energy.")
    if recipe.learn != "classifier" and not isinstance(purifier, LearnedChain):
        raise UsageError(
            f"{type(purifier).__name__} has no energy to learn; let the classifier learn."
        )
    if not purifier.differentiable:
        raise UsageError(
            f"{type(purifier).__name__} has no gradient of its own to attack with; train on an "
            "energy, Gaussian noise or no purifier."
        )
