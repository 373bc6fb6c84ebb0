"""Attacks made on one model and judged on another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from ebm_defense.attacks.base import Attack, Proposal, cost, lenient
from ebm_defense.attacks.checks import check_replicates
from ebm_defense.attacks.external.one_shot import Crafted, OneShotAttack
from ebm_defense.attacks.optimisers.pgd import PGD
from ebm_defense.attacks.threat import ThreatModel
from ebm_defense.defense import PurifiedClassifier, as_defense
from ebm_defense.errors import UsageError
from ebm_defense.interface.numbers import plain_numbers

SOURCES = {"classifier": "its own classifier", "undefended": "the undefended classifier"}


@dataclass(frozen=True, kw_only=True)
class Transfer(OneShotAttack):
    """The final iterates of an attack on another model, put before the defense.

    Attributes:
        attack: the attack on the other model.
        replicates: purifications of each final image before it is judged.
        source: whose images they are: a name in `SOURCES` ("classifier", the defense's own without
            its purifier, or "undefended", the one that reports show as undefended), or a model
            given on its own: a `PurifiedClassifier` or any classifier of [0, 1] images.
        label: what tables call a model given on its own.
    """

    attack: Attack = field(default_factory=PGD)
    replicates: int = 15
    source: str | Callable[[Tensor], Tensor] = "classifier"
    label: str = "another defense"

    def __post_init__(self) -> None:
        plain_numbers(self)
        if isinstance(self.source, str) and self.source not in SOURCES:
            raise UsageError(
                f"transfer comes from {' or '.join(SOURCES)} or from a model, "
                f"not from {self.source!r}."
            )
        if not isinstance(self.source, str | nn.Module):
            object.__setattr__(self, "source", as_defense(self.source))
        check_replicates(self.replicates)

    @property
    def threat(self) -> ThreatModel:  # type: ignore[override]
        return self.attack.threat

    @property
    def name(self) -> str:
        source = SOURCES[self.source] if isinstance(self.source, str) else self.label
        return f"transfer {self.attack.name} from {source}"

    @property
    def direct(self) -> Attack:
        return self.attack.direct

    @property
    def open_ended(self) -> bool:
        return self.attack.open_ended

    @property
    def least_classes(self) -> int:
        return self.attack.least_classes

    @property
    def models(self) -> tuple[PurifiedClassifier, ...]:
        named = isinstance(self.source, str)
        own = () if named else (as_defense(self.source),)  # type: ignore[arg-type]
        return *own, *self.attack.models

    def check(self, defense: PurifiedClassifier, images: Tensor, classes: int) -> None:
        super().check(defense, images, classes)
        self.attack.check(self._model(defense), images, classes)

    def chain_steps(self, defense: PurifiedClassifier) -> int:
        return super().chain_steps(defense) + self.attack.chain_steps(self._model(defense))

    def craft(
        self,
        defense: PurifiedClassifier,
        images: Tensor,
        labels: Tensor,
        *,
        ids: Sequence[int],
        seed: int,
    ) -> Crafted:
        costs: list[int] = []

        def judge(proposal: Proposal) -> Tensor:
            costs.append(cost(proposal, model))
            return lenient(proposal)

        model = self._model(defense)
        found = self.attack.run(model, images, labels, ids=ids, seed=seed, judge=judge)
        return Crafted(found, sum(costs))

    def _model(self, defense: PurifiedClassifier) -> PurifiedClassifier:
        named = isinstance(self.source, str)
        return as_defense(getattr(defense, self.source) if named else self.source)  # type: ignore
