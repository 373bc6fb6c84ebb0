"""Attacks of other libraries, made on a defense as if it were a plain model."""

from __future__ import annotations

import importlib.util
import inspect
import random
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, ClassVar, Self
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from ebm_defense.attacks import spec
from ebm_defense.attacks.checks import check_replicates
from ebm_defense.attacks.external.one_shot import Crafted, OneShotAttack
from ebm_defense.attacks.norms import NORMS
from ebm_defense.attacks.threat import ThreatModel
from ebm_defense.defense import PurifiedClassifier
from ebm_defense.errors import UsageError
from ebm_defense.interface.numbers import plain_numbers
from ebm_defense.noise import derive_seed
from ebm_defense.runtime.memory import is_full

Calls = Callable[[SimpleNamespace], int]
"""An attack class's parameters to how often it asks the model of an image that stands."""

EVERY = tuple(NORMS)
"""The norms of an attack that can be told any, or that has none of its own."""


@dataclass(frozen=True, kw_only=True)
class LibraryAttack(OneShotAttack):
    """An attack class of another library; only its final images are judged.

    The library sees the defense as a plain model that averages `replicates` purifications a call
    (EOT) and whose gradient is the identity (BPDA). Its own success flags are not asked for.
    Whatever it draws comes from the global generators of torch, NumPy and Python, which are seeded
    from (seed, ids) for the call and put back; so its draws depend on the batch. An image on which
    the library gives up stays as it is, with a warning.

    Attributes:
        attack: the class's name in the library.
        threat: what may change; the images are projected onto it.
        parameters: the class's own parameters, as a mapping or as "name=value, …"; those that
            it needs of the threat model, the classes and the seed are filled in.
        replicates: purifications a call and for the last query.

    A subclass names the `library`, the classes `refused` with the reason, the packages that some
    of them `needs`, the required parameters that it has `filled` itself, and, of classes that ask
    the defense equally often of every image that stands, the `calls` by their parameters.

    Raises:
        UsageError: the library is not installed, or the class does not exist, cannot keep to the
            norm, cannot attack an image classifier, or has no such parameter.
    """

    attack: str
    threat: ThreatModel = field(default_factory=ThreatModel)
    parameters: str | Mapping[str, Any] = ""
    replicates: int = 15

    library: ClassVar[str]
    refused: ClassVar[Mapping[str, str]]
    needs: ClassVar[Mapping[str, str]]
    filled: ClassVar[frozenset[str]]
    calls: ClassVar[Mapping[str, Calls]]

    def __post_init__(self) -> None:
        plain_numbers(self)
        title = f"{self.library}:{self.attack}"
        if not isinstance(self.parameters, str):
            object.__setattr__(self, "parameters", spec.write(self.parameters, title))
        check_replicates(self.replicates)
        _check_class(type(self), self.attack, self.threat.norm)
        self._check_parameters(title)

    @classmethod
    def of(cls, attack: str, *, threat: ThreatModel, replicates: int = 15, **own: Any) -> Self:
        """Make the attack from its class's own parameters as keyword arguments."""
        return cls(attack=attack, threat=threat, replicates=replicates, parameters=own)

    @classmethod
    @abstractmethod
    def classes(cls) -> dict[str, type]:
        """Return the library's attack classes by name."""

    @classmethod
    @abstractmethod
    def norms_of(cls, attack: type) -> tuple[str, ...]:
        """Return the norms that a class can move in: none where no norm bounds it."""

    @abstractmethod
    def perturb(
        self, model: PurifiedClassifier, images: Tensor, labels: Tensor, seed: int
    ) -> Tensor:
        """Run the library's attack on `images` `[b, C, H, W]`."""

    @property
    def name(self) -> str:
        own = f"({self.parameters})" if self.parameters else ""
        return f"{self.library} {self.attack}{own}"

    @property
    def direct(self) -> Self:
        return self

    @property
    def open_ended(self) -> bool:
        return self._calls is None

    def chain_steps(self, defense: PurifiedClassifier) -> int:
        """Return the Langevin steps that an image costs which stands to the end.

        Where `calls` does not know the class, those of the query of its final image alone.
        """
        return super().chain_steps(defense) + (self._calls or 0) * self._call_steps(defense)

    @property
    def _calls(self) -> int | None:
        """How often the library asks the defense of an image that stands; None if not known."""
        kind = self.classes()[self.attack]  # which may go by several names
        count = self.calls.get(kind.__name__)
        defaults = {name: p.default for name, p in inspect.signature(kind).parameters.items()}
        try:
            return None if count is None else int(count(SimpleNamespace(**defaults | self.own)))
        except (TypeError, ValueError):
            return None  # a parameter that only the library can refuse

    def _call_steps(self, defense: PurifiedClassifier) -> int:
        """Return the Langevin steps of one call for one image: those of the query."""
        return super().chain_steps(defense)

    @property
    def own(self) -> dict[str, Any]:
        """The class's own parameters that were given."""
        assert isinstance(self.parameters, str)
        return spec.parameters(self.parameters, self.name)

    def keywords(self, known: Mapping[str, Any]) -> dict[str, Any]:
        """Return what to call the class with: `known` as far as it takes it, then its own."""
        takes = spec.parameter_names(self.classes()[self.attack])
        return {name: value for name, value in known.items() if name in takes} | self.own

    def craft(
        self,
        defense: PurifiedClassifier,
        images: Tensor,
        labels: Tensor,
        *,
        ids: Sequence[int],
        seed: int,
    ) -> Crafted:
        asked: list[int] = []
        try:
            found = self._attempt(defense, images, labels, ids, seed, asked)
        except Exception as error:
            _raise_if_out_of_memory(error)
            found = self._one_by_one(defense, images, labels, ids, seed, asked)
        return Crafted(found, sum(asked) * self._call_steps(defense))

    def _one_by_one(
        self,
        defense: PurifiedClassifier,
        images: Tensor,
        labels: Tensor,
        ids: Sequence[int],
        seed: int,
        asked: list[int],
    ) -> Tensor:
        crafted, failed, reason = images.clone(), [], ""
        for i, number in enumerate(ids):
            one = slice(i, i + 1)
            try:
                crafted[one] = self._attempt(
                    defense, images[one], labels[one], [number], seed, asked
                )
            except Exception as error:
                _raise_if_out_of_memory(error)
                failed.append(number)
                reason = f"{type(error).__name__}: {' '.join(str(error).split()) or 'no reason'}"
        if len(failed) == len(images):
            raise UsageError(f"{self.name} cannot attack this model ({reason[:200].rstrip('.')}).")
        if failed:
            numbers = ", ".join(map(str, failed))
            warnings.warn(f"{self.name} gave up on image {numbers} ({reason[:200]}).", stacklevel=2)
        return crafted

    def _attempt(
        self,
        defense: PurifiedClassifier,
        images: Tensor,
        labels: Tensor,
        ids: Sequence[int],
        seed: int,
        asked: list[int],
    ) -> Tensor:
        """Run the attack, and add to `asked` of how many images it asked the defense at a time."""
        own = derive_seed(seed, f"{self.library} {self.attack} {list(ids)}")
        model = plain_view(defense, self.replicates, own)
        model.register_forward_pre_hook(lambda _, inputs: asked.append(len(inputs[0])))
        with forked_generators(own, images.device):
            found = self.perturb(model, images.clone(), labels.clone(), own % 2**31).detach()
        finite = found.isfinite().flatten(1).all(1)
        return torch.where(finite.view(-1, 1, 1, 1), found.to(images), images)

    def _check_parameters(self, title: str) -> None:
        signature = inspect.signature(self.classes()[self.attack])
        takes = spec.parameter_names(self.classes()[self.attack]) - {
            "model",
            "estimator",
            "classifier",
        }
        spec.refuse_unknown(self.own, takes, title)
        for name, parameter in signature.parameters.items():
            wanted = parameter.default is parameter.empty and parameter.kind not in (
                parameter.VAR_POSITIONAL,
                parameter.VAR_KEYWORD,
            )
            if wanted and name in takes and name not in self.own and name not in self.filled:
                raise UsageError(f"{title} needs its {name}: write {title}({name}=…).")


def _check_class(kind: type[LibraryAttack], attack: str, norm: str) -> None:
    classes = kind.classes()
    if attack not in classes:
        raise UsageError(f"{kind.library} has no attack {attack!r}; {spec.near(attack, classes)}.")
    title = f"{kind.library}:{attack}"
    if attack in kind.refused:
        raise UsageError(f"{title} cannot be used here: {kind.refused[attack]}.")
    package = kind.needs.get(attack)
    if package is not None and importlib.util.find_spec(package) is None:
        raise UsageError(f"{title} needs the package {package}; pip install {package}.")
    norms = kind.norms_of(classes[attack])
    if not norms:
        raise UsageError(f"{title} cannot be used here: no norm bounds what it changes.")
    if norm not in norms:
        moves = " or ".join(norms)
        raise UsageError(f"{title} moves in {moves}, not in {norm}; give a threat in {moves}.")


def _raise_if_out_of_memory(error: Exception) -> None:
    """Let through the one failure that is not the library's."""
    if is_full(error):
        raise error


def plain_view(defense: PurifiedClassifier, replicates: int, seed: int) -> PurifiedClassifier:
    """Return a defense of the same parts that draws from a seed and a call counter of its own."""
    view = PurifiedClassifier(
        defense.classifier,
        defense.purifier,
        replicates,
        average=defense.average,
        max_chains=defense.max_chains,
        seed=seed,
        undefended=defense.undefended,
    )
    view.know(defense)
    return view


@contextmanager
def forked_generators(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the global generators of torch, NumPy and Python for a block, and put them back."""
    kept = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []), _seeded_new_generators():
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        try:
            yield
        finally:
            random.setstate(kept[0])
            np.random.set_state(kept[1])


@contextmanager
def _seeded_new_generators() -> Iterator[None]:
    """Seed from NumPy's global generator what would be seeded by the operating system.

    ART makes such generators for itself, and its attacks would never repeat.
    """

    class Seeded(np.random.RandomState):
        def __init__(self, seed: Any = None) -> None:
            super().__init__(np.random.randint(2**31) if seed is None else seed)

    with mock.patch.object(np.random, "RandomState", Seeded):
        yield


def not_installed(library: str, package: str) -> UsageError:
    """Return what to raise where a library cannot be imported."""
    return UsageError(
        f"{library} is not installed; pip install 'ebm-defense[attacks]', or pip install {package}."
    )


def classes_count(model: PurifiedClassifier, images: Tensor) -> int:
    """Return how many classes a defense tells apart."""
    with torch.no_grad():
        return int(model.classify(images[:1]).shape[-1])
