"""torchattacks' attacks by name (Kim 2020)."""

from __future__ import annotations

import contextlib
import inspect
import io
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import ClassVar

from torch import Tensor

from ebm_defense._torchvision import torchvision
from ebm_defense.attacks import spec
from ebm_defense.attacks.external.library import (
    EVERY,
    Calls,
    LibraryAttack,
    classes_count,
    not_installed,
)
from ebm_defense.defense import PurifiedClassifier

# torchattacks does not say in which norm a class moves.
NORMS: dict[str, tuple[str, ...]] = {
    "CW": ("L2",),
    "DeepFool": ("L2",),
    "EADEN": ("L1",),
    "EADL1": ("L1",),
    "GN": EVERY,
    "JSMA": ("L0",),
    "OnePixel": ("L0",),
    "PGDL2": ("L2",),
    "PGDRSL2": ("L2",),
    "Pixle": ("L0",),
    "SparseFool": ("L1",),
    "VANILA": EVERY,
}


def torchattacks() -> ModuleType:
    """Import torchattacks, or raise a `UsageError` that says how to install it."""
    torchvision("datasets")  # which torchattacks imports, and which does not load everywhere
    try:
        import torchattacks
    except ImportError as error:
        raise not_installed("torchattacks", "torchattacks") from error
    return torchattacks


@dataclass(frozen=True, kw_only=True)
class TorchattacksAttack(LibraryAttack):
    """An attack class of torchattacks, such as "APGDT" or "Square"; see `LibraryAttack`."""

    library: ClassVar[str] = "torchattacks"
    filled: ClassVar[frozenset[str]] = frozenset()
    calls: ClassVar[Mapping[str, Calls]] = {
        "FGSM": lambda own: 1,
        **dict.fromkeys(("BIM", "MIFGSM", "PGD", "PGDL2"), lambda own: own.steps),
        "EOTPGD": lambda own: own.steps * own.eot_iter,
        "APGD": lambda own: 1 + own.n_restarts * (own.steps + 1) * own.eot_iter,
        "Square": lambda own: 1 + own.n_restarts * (own.n_queries + 2),
    }
    needs: ClassVar[Mapping[str, str]] = {}
    refused: ClassVar[Mapping[str, str]] = {
        "LGV": "it trains copies of the model on data of its own",
        "MultiAttack": "it joins other attacks; name each with an --attack of its own",
    }

    @classmethod
    @cache
    def classes(cls) -> dict[str, type]:
        module = torchattacks()
        base = module.attack.Attack
        found = {name: getattr(module, name) for name in dir(module)}
        return {n: c for n, c in found.items() if inspect.isclass(c) and issubclass(c, base)}

    @classmethod
    def norms_of(cls, attack: type) -> tuple[str, ...]:
        if "norm" in spec.parameter_names(attack):
            return ("Linf", "L2")  # it asserts so
        return NORMS.get(attack.__name__, ("Linf",))

    def perturb(
        self, model: PurifiedClassifier, images: Tensor, labels: Tensor, seed: int
    ) -> Tensor:
        eps = self.threat.eps
        known = {
            "eps": eps,
            "max_epsilon": eps,
            "norm": self.threat.norm,
            "n_classes": classes_count(model, images),
            "seed": seed,
        }
        with contextlib.redirect_stdout(io.StringIO()):  # it prints where a model has no device
            attack = self.classes()[self.attack](model, **self.keywords(known))
            attack.set_device(images.device)
            found: Tensor = attack(images, labels)
        return found
