"""foolbox's attacks by name (Rauber, Brendel, Bethge 2017)."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any, ClassVar

from torch import Tensor

from ebm_defense._torchvision import torchvision
from ebm_defense.attacks import spec
from ebm_defense.attacks.external.library import EVERY, Calls, LibraryAttack, not_installed
from ebm_defense.defense import PurifiedClassifier

NORMS = {0: "L0", 1: "L1", 2: "L2", float("inf"): "Linf"}
SOME = {"HopSkipJumpAttack": ("Linf", "L2")}
"""Those that are told a norm, but do not take every one."""
DISTANCES = {"L1": "l1", "L2": "l2", "Linf": "linf"}


def foolbox() -> ModuleType:
    """Import foolbox, or raise a `UsageError` that says how to install it."""
    torchvision("datasets")  # which foolbox imports, and which does not load everywhere by itself
    try:
        import foolbox
    except ImportError as error:
        raise not_installed("foolbox", "foolbox") from error
    return foolbox


@dataclass(frozen=True, kw_only=True)
class FoolboxAttack(LibraryAttack):
    """An attack class of foolbox, such as "LinfPGD" or "L2DeepFoolAttack"; see `LibraryAttack`.

    Attacks that look for the smallest perturbation are cut off at eps.
    """

    library: ClassVar[str] = "foolbox"
    filled: ClassVar[frozenset[str]] = frozenset({"distance", "constraint"})
    refused: ClassVar[Mapping[str, str]] = {
        "BinarizationRefinementAttack": "it needs adversarial images to begin with",
        "GenAttack": "it needs a target class",
        "PointwiseAttack": "foolbox keeps no distance for it, so no eps bounds it",
    }
    # foolbox looks at what it returns once more.
    calls: ClassVar[Mapping[str, Calls]] = {
        f"{norm}{kind}": lambda own: getattr(own, "steps", 1) + 1
        for norm in ("L1", "L2", "Linf")
        for kind in (
            "FastGradientAttack",
            "BasicIterativeAttack",
            "AdamBasicIterativeAttack",
            "ProjectedGradientDescentAttack",
            "AdamProjectedGradientDescentAttack",
        )
    }
    needs: ClassVar[Mapping[str, str]] = {
        f"{norm}BrendelBethgeAttack": "numba" for norm in ("L0", "L1", "L2", "Linfinity")
    }

    @classmethod
    @cache
    def classes(cls) -> dict[str, type]:
        module = foolbox().attacks
        found = {name: getattr(module, name) for name in dir(module)}
        kinds = {n: c for n, c in found.items() if inspect.isclass(c) and issubclass(c, _base())}
        return {n: c for n, c in kinds.items() if not inspect.isabstract(c)}

    @classmethod
    def norms_of(cls, attack: type) -> tuple[str, ...]:
        if spec.parameter_names(attack) & cls.filled:
            return SOME.get(attack.__name__, EVERY)
        distance = getattr(attack, "distance", None)
        if isinstance(distance, property):
            assert distance.fget is not None
            distance = distance.fget(attack)
        return () if distance is None else (NORMS[distance.p],)

    def perturb(
        self, model: PurifiedClassifier, images: Tensor, labels: Tensor, seed: int
    ) -> Tensor:
        library = foolbox()
        seen = library.PyTorchModel(model, bounds=(0, 1), device=images.device)
        attack = self.classes()[self.attack](**self.keywords(self._norm(library)))
        if hasattr(attack, "feed"):
            attack.feed(seen, images)
        criterion = library.criteria.Misclassification(labels)
        found: Tensor = attack(seen, images, criterion, epsilons=self.threat.eps)[1]
        return found

    def _norm(self, library: ModuleType) -> dict[str, Any]:
        name = DISTANCES[self.threat.norm]
        return {"distance": getattr(library.distances, name), "constraint": name}


def _base() -> type:
    return foolbox().attacks.base.Attack
