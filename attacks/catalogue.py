"""Every attack by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

from ebm_defense.attacks import spec
from ebm_defense.attacks.base import Attack
from ebm_defense.attacks.external.advgan import AdvGAN
from ebm_defense.attacks.external.art_adapter import ArtAttack
from ebm_defense.attacks.external.foolbox_adapter import FoolboxAttack
from ebm_defense.attacks.external.library import LibraryAttack
from ebm_defense.attacks.external.torchattacks_adapter import TorchattacksAttack
from ebm_defense.attacks.external.transfer import SOURCES, Transfer
from ebm_defense.attacks.gradients.registry import GRADIENTS
from ebm_defense.attacks.losses import LOSSES, CrossEntropy, Loss
from ebm_defense.attacks.norms import NORMS
from ebm_defense.attacks.optimisers.apgd import APGD, TargetedAPGD
from ebm_defense.attacks.optimisers.diffhammer import DiffHammer
from ebm_defense.attacks.optimisers.pgd import PGD
from ebm_defense.attacks.optimisers.spsa import SPSA
from ebm_defense.attacks.optimisers.square import Square
from ebm_defense.attacks.threat import ThreatModel
from ebm_defense.errors import UsageError
from ebm_defense.storage.weights import load_defense

STEPS_ACROSS_EPS = 4  # the published step is 2/255 at eps 8/255
FACTORS: dict[str, Mapping[str, Callable[..., Any]]] = {"gradient": GRADIENTS, "loss": LOSSES}
"""The settings of an attack that may be given by name, each with its registry."""


class Entry(NamedTuple):
    """One attack, or one family of attacks.

    Attributes:
        make: makes the attack from settings, which are the keywords of its signature. A family's
            takes the member's name first.
        summary: one line.
        source: where it was published.
        limited: the norms that it keeps to; all there are, whoever added them, if none is named.
        fixed: settings of `make` that are not to be chosen, since the name says them.
    """

    make: Callable[..., Attack]
    summary: str
    source: str
    limited: tuple[str, ...] = ()
    fixed: tuple[str, ...] = ()

    @property
    def norms(self) -> tuple[str, ...]:
        """The norms that it keeps to."""
        return self.limited or tuple(NORMS)


def transfer(
    source: str = "classifier",
    *,
    threat: ThreatModel,
    steps: int = 50,
    step_size: float,
    replicates: int = 15,
    loss: Loss | None = None,
) -> Transfer:
    """Make a transfer of PGD's images from a name in `SOURCES`, a shipped defense or a folder."""
    pgd = PGD(
        threat=threat,
        steps=steps,
        step_size=step_size,
        replicates=replicates,
        loss=loss or CrossEntropy(),
    )
    if source in SOURCES:
        return Transfer(attack=pgd, replicates=replicates, source=source)
    model = load_defense(source, seed=0)
    return Transfer(attack=pgd, replicates=replicates, source=model, label=source)


def advgan(folder: str, *, threat: ThreatModel, replicates: int = 15) -> AdvGAN:
    """Make AdvGAN from the folder that `ebm-defense train-advgan` wrote."""
    return AdvGAN(weights=folder, threat=threat, replicates=replicates)


ATTACKS: dict[str, Entry] = {
    "bpda": Entry(
        PGD, "PGD on replicates, purifier as identity", "Hill et al. 2021", fixed=("gradient",)
    ),
    "pgd": Entry(PGD, "projected gradient ascent on replicates (EOT)", "Madry et al. 2018"),
    "apgd": Entry(APGD, "PGD that chooses its own step sizes", "Croce, Hein 2020"),
    "apgd-t": Entry(TargetedAPGD, "APGD towards the likeliest classes in turn", "Croce, Hein 2020"),
    "diffhammer": Entry(
        DiffHammer, "gradients of the replicates that can be broken together", "Wang et al. 2024"
    ),
    "square": Entry(Square, "random squares, no gradient", "Andriushchenko et al. 2020"),
    "spsa": Entry(SPSA, "finite differences in random directions", "Uesato et al. 2018"),
    "transfer": Entry(transfer, "PGD's images of the bare classifier", "Papernot et al. 2016"),
}

FAMILIES: dict[str, Entry] = {
    "transfer": Entry(
        transfer, "PGD's images of another defense, a name or folder", "Papernot et al. 2016"
    ),
    "advgan": Entry(advgan, "a trained generator, FOLDER of train-advgan", "Xiao et al. 2018"),
    "foolbox": Entry(FoolboxAttack.of, "an attack of foolbox", "Rauber et al. 2017"),
    "torchattacks": Entry(TorchattacksAttack.of, "an attack of torchattacks", "Kim 2020"),
    "art": Entry(ArtAttack.of, "an evasion attack of ART", "Nicolae et al. 2018"),
}

LIBRARIES: tuple[type[LibraryAttack], ...] = (FoolboxAttack, TorchattacksAttack, ArtAttack)


def make_attack(text: str, **settings: Any) -> Attack:
    """Make an attack from its name.

    Args:
        text: a name in `ATTACKS`, or `family:member` with a family in `FAMILIES`, such as
            "foolbox:L2DeepFoolAttack" or "transfer:FOLDER"; either with parameters in brackets,
            "foolbox:L2DeepFoolAttack(steps=10)", which win over `settings`.
        **settings: threat, steps, step_size (a quarter of eps if not given), replicates, gradient,
            loss and whatever else the attack takes; a library's attack takes its class's own.
            A gradient or a loss may be a name in `GRADIENTS` or `LOSSES`.

    Raises:
        UsageError: an unknown name, a setting the attack does not take, a norm it cannot keep to,
            or a number out of range.
    """
    name, own = spec.parse(text)
    entry, make = _find(name)
    given = settings | own
    threat = given.get("threat", ThreatModel())
    if threat.norm not in entry.norms:
        raise UsageError(f"attack {name} keeps to {' or '.join(entry.norms)}, not {threat.norm}.")
    if not _takes_anything(make):
        spec.refuse_unknown(given, takes(text), f"attack {name}")
    for factor, registry in FACTORS.items():
        if isinstance(given.get(factor), str):
            given[factor] = spec.make(registry, given[factor], factor)
    if "step_size" in takes(text) and "step_size" not in given:
        given["step_size"] = threat.eps / STEPS_ACROSS_EPS
    return make(**({"threat": threat} | given))


def takes(text: str) -> frozenset[str]:
    """Return the settings that an attack of this name takes by itself, a library's own aside.

    Raises:
        UsageError: an unknown name.
    """
    entry, make = _find(spec.parse(text).name)
    return spec.parameter_names(make) - set(entry.fixed)


def _find(name: str) -> tuple[Entry, Callable[..., Attack]]:
    family, colon, member = name.partition(":")
    if not colon:
        if name not in ATTACKS:
            families = ", ".join(f"{f}:NAME" for f in FAMILIES)
            raise UsageError(f"unknown attack {name!r}; {spec.near(name, ATTACKS)}, or {families}.")
        return ATTACKS[name], ATTACKS[name].make
    entry = spec.lookup(FAMILIES, family, "family of attacks")
    if not member:
        raise UsageError(f"{name!r} names no attack; write {family}:NAME.")
    return entry, partial(entry.make, member)


def _takes_anything(make: Callable[..., Attack]) -> bool:
    found = inspect.signature(make).parameters.values()
    return any(p.kind is p.VAR_KEYWORD for p in found)


def library_attacks() -> Iterator[tuple[str, str]]:
    """Yield each library attack that can be used here, with the norms it keeps to.

    A library that is not installed yields one line that says so.
    """
    for kind in LIBRARIES:
        try:
            classes = kind.classes()
        except UsageError as error:
            yield f"{kind.library}:…", str(error)
            continue
        for name, attack in classes.items():
            norms = () if name in kind.refused else kind.norms_of(attack)
            if any(norm in NORMS for norm in norms):
                yield f"{kind.library}:{name}", " ".join(norms)
