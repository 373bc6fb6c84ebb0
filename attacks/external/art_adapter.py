"""The attacks of ART, the Adversarial Robustness Toolbox, by name (Nicolae et al. 2018)."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

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

# ART does not say in which norm a class moves unless it takes one.
NORMS = {
    "BasicIterativeMethod": "Linf",
    "BoundaryAttack": "L2",
    "CarliniL0Method": "L0",
    "CarliniL2Method": "L2",
    "CarliniLInfMethod": "Linf",
    "DeepFool": "L2",
    "ElasticNet": "L1",
    "NewtonFool": "L2",
    "PixelAttack": "L0",
    "SaliencyMapMethod": "L0",
    "SignOPTAttack": "L2",
    "SimBA": "L2",
    "ThresholdAttack": "Linf",
    "VirtualAdversarialMethod": "L2",
    "ZooAttack": "L2",
}
SOME = {"HopSkipJump": ("Linf", "L2"), "SquareAttack": ("Linf", "L2")}
"""Those that take a norm, but not every one; in L1 ART's Square changes nothing."""
WANT_PROBABILITIES = ("SimBA", "VirtualAdversarialMethod")
ORDERS = {"Linf": math.inf, "L2": 2, "L1": 1}
PATCH = "it makes a patch, which no norm bounds"
VIDEO = "it attacks video"
FEATURES = "it wants a target's features"
NO_TENSORFLOW = "it is written for TensorFlow"
REFUSED = {
    "AdversarialPatch": PATCH,
    "AdversarialPatchNumpy": PATCH,
    "AdversarialPatchPyTorch": PATCH,
    "AdversarialPatchTensorFlowV2": NO_TENSORFLOW,
    "FeatureAdversariesNumpy": FEATURES,
    "FeatureAdversariesPyTorch": FEATURES,
    "FeatureAdversariesTensorFlowV2": NO_TENSORFLOW,
    "FrameSaliencyAttack": VIDEO,
    "LowProFool": "it attacks tables of features",
    "MalwareGDTensorFlow": NO_TENSORFLOW,
    "OverTheAirFlickeringPyTorch": VIDEO,
    "OverloadPyTorch": "it attacks object detectors",
    "ProjectedGradientDescentTensorFlowV2": NO_TENSORFLOW,
    "SNAL": "it attacks object detectors",
    "TargetedUniversalPerturbation": "it needs a target class",
    "Wasserstein": "it moves in a Wasserstein ball",
}


def art() -> ModuleType:
    """Import ART, or raise a `UsageError` that says how to install it."""
    torchvision("datasets")  # which ART imports, and which does not load everywhere by itself
    try:
        import art.attacks.evasion
        import art.estimators.classification
    except ImportError as error:
        raise not_installed("ART", "adversarial-robustness-toolbox") from error
    return art


@dataclass(frozen=True, kw_only=True)
class ArtAttack(LibraryAttack):
    """An evasion attack of ART, such as "SquareAttack" or "DeepFool"; see `LibraryAttack`."""

    library: ClassVar[str] = "art"
    filled: ClassVar[frozenset[str]] = frozenset({"norm"})
    refused: ClassVar[Mapping[str, str]] = REFUSED
    calls: ClassVar[Mapping[str, Calls]] = {
        "BasicIterativeMethod": lambda own: own.max_iter + 2,
        "ProjectedGradientDescent": (lambda own: max(1, own.num_random_init) * (own.max_iter + 2)),
    }
    needs: ClassVar[Mapping[str, str]] = {
        "AutoAttack": "multiprocess",
        "PixelAttack": "cma",
        "ThresholdAttack": "cma",
    }

    @classmethod
    @cache
    def classes(cls) -> dict[str, type]:
        module = art().attacks
        found = {name: getattr(module.evasion, name) for name in dir(module.evasion)}
        base = module.EvasionAttack
        return {n: c for n, c in found.items() if inspect.isclass(c) and issubclass(c, base)}

    @classmethod
    def norms_of(cls, attack: type) -> tuple[str, ...]:
        if not _attacks_classifiers(attack):
            return ()
        name = attack.__name__
        if "norm" in spec.parameter_names(attack):
            return SOME.get(name, EVERY)
        return (NORMS[name],) if name in NORMS else ()

    def perturb(
        self, model: PurifiedClassifier, images: Tensor, labels: Tensor, seed: int
    ) -> Tensor:
        classes = classes_count(model, images)
        one_hot = nn.functional.one_hot(labels, classes).cpu().numpy()
        # ART rescales eps_step only where eps is its own default.
        known: dict[str, Any] = {
            "eps": self.threat.eps,
            "norm": ORDERS[self.threat.norm],
            "batch_size": len(images),
            "verbose": False,
            "eps_step": self.threat.eps / 4,
            "attacker_params": {"verbose": False},
        }
        plain = _Plain(model, images.dtype, self.attack in WANT_PROBABILITIES)
        attack = self.classes()[self.attack](
            _estimator(plain, images, classes), **self.keywords(known)
        )
        found = attack.generate(x=images.float().cpu().numpy(), y=one_hot)
        return torch.from_numpy(found).to(images)


class _Plain(nn.Module):
    """A model of images in ART's own precision, with logits or probabilities out."""

    def __init__(self, model: nn.Module, dtype: torch.dtype, probabilities: bool) -> None:
        super().__init__()
        self.model, self.dtype, self.probabilities = model, dtype, probabilities

    def forward(self, x: Tensor) -> Tensor:
        logits = self.model(x.to(self.dtype))
        return logits.softmax(-1) if self.probabilities else logits


def _estimator(model: nn.Module, images: Tensor, classes: int) -> Any:
    return art().estimators.classification.PyTorchClassifier(
        model,
        loss=nn.CrossEntropyLoss(),
        input_shape=tuple(images.shape[1:]),
        nb_classes=classes,
        clip_values=(0.0, 1.0),
        device_type="gpu" if images.device.type == "cuda" else "cpu",
    )


def _attacks_classifiers(attack: type) -> bool:
    """Whether a PyTorch image classifier is what a class wants."""
    kind = art().estimators.classification.PyTorchClassifier
    wanted = getattr(attack, "_estimator_requirements", None) or ()
    return all(issubclass(kind, requirement) for requirement in wanted)
