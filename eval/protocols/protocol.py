"""An evaluation as a frozen, printable value; the published ones as presets."""

from __future__ import annotations

import dataclasses
import logging
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w

from ebm_defense import attacks
from ebm_defense.attacks import PGD, Attack, Gradient, Identity, ThreatModel, Transfer
from ebm_defense.attacks.gradients.registry import Auto
from ebm_defense.attacks.norms import norm_name
from ebm_defense.errors import UsageError
from ebm_defense.eval.judging.judge import refuse_looks
from ebm_defense.eval.judging.rules import AsDeployed, OneStage, Rule, TwoStage
from ebm_defense.eval.judging.selection import Selection
from ebm_defense.eval.judging.sequential import Sequential
from ebm_defense.eval.protocols.presets import (
    STANDARD,
    mefa_attack,
    standard_attacks,
    standard_kind,
    with_restarts,
)
from ebm_defense.interface.numbers import plain_numbers
from ebm_defense.storage.files import writable_folder, write_text
from ebm_defense.storage.serialize import build, describe

LOG = logging.getLogger("ebm_defense.eval")
PUBLISHED_EPS = {"Linf": 8 / 255, "L2": 0.5, "L1": 12.0}
"""The customs of CIFAR-10, which the presets were published for."""
SELECTED = "selected"
STEPS_ACROSS_EPS = 4  # the published step is 2/255 at eps 8/255


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What is run and how it is judged.

    Attributes:
        name: stands in every table.
        attacks: each is judged on its own row.
        judge_replicates: fresh draws H of a judgement, at most, and of clean accuracy.
        verdict: the rule by which draws become a verdict.
        ensemble: whether an attack spares the images that one before it broke.
        looks: a name in `LOOKS`: whether the one image that is selected from all that an attack
            proposes comes before the judge; or, as in published protocols, an attack's every look,
            or the images that it ends with. If not given "selected", and "every" for the
            two-stage rule.
        selection: how that image is selected; only where looks is "selected", and there
            `Selection` if not given.

    A protocol called "standard" that lacks an attack of that ensemble is called "standard-partial".

    Raises:
        UsageError: a setting out of range, or a verdict that does not fit the looks.
    """

    name: str
    attacks: tuple[Attack, ...]
    judge_replicates: int
    verdict: Rule = field(default_factory=AsDeployed)
    ensemble: bool = False
    looks: str = ""
    selection: Selection | None = None

    def __post_init__(self) -> None:
        plain_numbers(self)
        if self.judge_replicates < 1:
            raise UsageError(f"judge replicates must be at least 1, not {self.judge_replicates}.")
        if not self.attacks:
            raise UsageError("a protocol needs at least one attack.")
        if not self.looks:
            published = isinstance(self.verdict, TwoStage)
            object.__setattr__(self, "looks", "every" if published else SELECTED)
        if self.looks not in LOOKS:
            raise UsageError(f"looks is {self.looks!r}; choose one of {', '.join(LOOKS)}.")
        self._check_verdict()
        if self.looks == SELECTED and self.selection is None:
            object.__setattr__(self, "selection", Selection())
        # Here, so that no way to make a protocol can keep the name of one that does more.
        if self.name == "standard" and not self._complete():
            object.__setattr__(self, "name", "standard-partial")

    def _check_verdict(self) -> None:
        if self.looks == SELECTED:
            refuse_looks(self.verdict)
        elif self.selection is not None:
            raise UsageError(f"looks={self.looks!r} selects no image, so it takes no selection.")
        elif self.looks == "every" and isinstance(self.verdict, AsDeployed):
            raise UsageError(
                "the as-deployed verdict judges one image of each, not an attack's every look; "
                'give looks="selected".'
            )

    def _complete(self) -> bool:
        return self.ensemble and {standard_kind(a) for a in self.attacks} >= STANDARD

    @property
    def judged_once(self) -> bool:
        """Whether one image of each is selected and judged once; else as published."""
        return self.looks == SELECTED or isinstance(self.verdict, AsDeployed)

    def fitting(self, classes: int, *, stochastic: bool = True) -> Protocol:
        """Return "standard" as it fits a model, and other protocols as they are.

        For a deterministic one `with_restarts`; without the attacks that need more classes, of
        which it says which, and is then called "standard-partial".
        """
        if self.name != "standard":
            return self
        if not stochastic:
            restarted = tuple(map(with_restarts, self.attacks))
            return dataclasses.replace(self, attacks=restarted).fitting(classes)
        kept = tuple(a for a in self.attacks if a.least_classes <= classes)
        if kept == self.attacks:
            return self
        dropped = ", ".join(a.name for a in self.attacks if a not in kept)
        LOG.warning(
            "standard without %s, which need more than the model's %d classes.", dropped, classes
        )
        return dataclasses.replace(self, attacks=kept)

    def save(self, path: str | Path) -> Path:
        """Write the protocol to a TOML file that `load_protocol` reads, and return its path."""
        file = Path(path).expanduser()
        writable_folder(file.parent)
        write_text(file, tomli_w.dumps(describe(self)))
        return file

    def __str__(self) -> str:
        return tomli_w.dumps(describe(self))


LOOKS = (SELECTED, "every", "last")
VERDICTS: dict[str, Callable[..., Rule]] = {
    "as-deployed": AsDeployed,
    "two-stage": TwoStage,
    "one-stage": OneStage,
    "sequential": Sequential,
}


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The numbers of a BPDA+EOT evaluation; None keeps the preset's.

    Attributes:
        norm: "Linf", "L2" or "L1".
        eps: in [0, 1] units; CIFAR-10's custom in this norm if not given.
        bits: of the lattice on which attacked images lie; see `ThreatModel`.
        steps: attack steps.
        step_size: in [0, 1] units; a quarter of eps if not given.
        replicates: attack replicates.
        judge_replicates: fresh draws of a judgement.
        selection_replicates: fresh draws by which the image that is judged is selected.
        verdict: a name in `VERDICTS`.
        alpha: error level of the sequential verdict.
        looks: a name in `LOOKS`.

    Raises:
        UsageError: what is no number, an unknown norm, or one without a custom and without eps.
    """

    norm: str | None = None
    eps: float | None = None
    bits: int | None = None
    steps: int | None = None
    step_size: float | None = None
    replicates: int | None = None
    judge_replicates: int | None = None
    selection_replicates: int | None = None
    verdict: str | None = None
    alpha: float | None = None
    looks: str | None = None

    def __post_init__(self) -> None:
        plain_numbers(self)
        if self.norm is not None:
            object.__setattr__(self, "norm", norm_name(self.norm))

    def over(self, **preset: Any) -> dict[str, Any]:
        """Return a preset's numbers, replaced by those given here; a step is a quarter of eps."""
        given = {k: v for k, v in dataclasses.asdict(self).items() if v is not None}
        number = preset | given
        return {"step_size": self.threat.eps / STEPS_ACROSS_EPS} | number

    @property
    def threat(self) -> ThreatModel:
        """The threat model asked for, at CIFAR-10's custom unless eps is given."""
        norm = self.norm or "Linf"
        if self.eps is None and norm not in PUBLISHED_EPS:
            raise UsageError(f"there is no customary eps in {norm}; give one, in [0, 1] units.")
        eps = PUBLISHED_EPS[norm] if self.eps is None else self.eps
        return ThreatModel(norm=norm, eps=eps, bits=self.bits)

    def rule(self, preset: Rule) -> Rule:
        """Return the verdict asked for, or the preset's.

        Raises:
            UsageError: an unknown verdict, or an alpha for one that has none.
        """
        if self.verdict is not None and self.verdict not in VERDICTS:
            known = ", ".join(VERDICTS)
            raise UsageError(f"unknown verdict {self.verdict!r}; choose one of {known}.")
        rule = preset if self.verdict is None else VERDICTS[self.verdict]()
        if self.alpha is None:
            return rule
        if not isinstance(rule, Sequential):
            raise UsageError(f"the {rule.name} verdict has no alpha; the sequential one has.")
        return dataclasses.replace(rule, alpha=self.alpha)

    def judged(self, name: str, number: dict[str, Any], preset: Rule, looks: str) -> dict[str, Any]:
        """Return how a preset of this name is judged, as keywords of `Protocol`.

        The two-stage rule is about an attack's every look, and brings every look before the judge.

        Raises:
            UsageError: as `rule`, or selection replicates where nothing is selected.
        """
        rule = self.rule(preset)
        if self.looks is not None:
            looks = self.looks
        elif looks == SELECTED and isinstance(rule, TwoStage):
            looks = "every"
        elif looks == "every" and isinstance(rule, AsDeployed):
            looks = SELECTED
        judged = {"judge_replicates": number["judge_replicates"], "verdict": rule, "looks": looks}
        if looks == SELECTED:
            draws = number.get("selection_replicates", Selection().draws)
            return judged | {"selection": Selection(draws=draws)}
        if self.selection_replicates is not None:
            raise UsageError(
                f"protocol {name} judges {'every look' if looks == 'every' else 'last images'} and "
                "selects none, so it takes no selection replicates."
            )
        return judged


def _pgd(
    name: str,
    budget: Budget,
    rule: Rule,
    looks: str,
    preset: dict[str, int],
    *,
    gradient: Gradient | None = None,
    transfer: bool = False,
) -> Protocol:
    number = budget.over(**preset)
    pgd = PGD(
        threat=budget.threat,
        gradient=gradient or Identity(),
        **{k: number[k] for k in ("steps", "step_size", "replicates")},
    )
    attacks: tuple[Attack, ...] = (pgd,)
    if transfer:
        attacks = (Transfer(attack=pgd, replicates=number["replicates"]), pgd)
    return Protocol(name=name, attacks=attacks, **budget.judged(name, number, rule, looks))


def _hill2021(budget: Budget) -> Protocol:
    """BPDA+EOT as published by Hill, Mitchell, Zhu (2021), and their transfer attack."""
    preset = {"steps": 50, "replicates": 15, "judge_replicates": 150}
    return _pgd("hill2021", budget, TwoStage(), "every", preset, transfer=True)


def _lifecycle2022(budget: Budget) -> Protocol:
    """BPDA+EOT as published by Hill et al. (2022, EBM Life Cycle) for CIFAR-10."""
    preset = {"steps": 50, "replicates": 48, "judge_replicates": 128}
    return _pgd("lifecycle2022", budget, TwoStage(), "every", preset)


def _quick(budget: Budget) -> Protocol:
    """PGD+EOT by the gradient that fits, in minutes on a CPU: a first impression, no result for a
    paper.
    """
    preset = {"steps": 10, "replicates": 8, "judge_replicates": 32, "selection_replicates": 16}
    # Around the chain, defenses of few steps look far stronger than they are.
    return _pgd("quick", budget, AsDeployed(), SELECTED, preset, gradient=Auto())


def _mefa2026(budget: Budget) -> Protocol:
    """PGD+EOT through every step of the chain, its last images validated once on the mean logits
    of 100 fresh replicates, as published by Du, Hill, Cai (2026, MEFA).
    """
    preset = {"steps": 100, "replicates": 20, "judge_replicates": 100}
    number = budget.over(**preset)
    attack = mefa_attack(budget.threat, number["steps"], number["step_size"], number["replicates"])
    judged = budget.judged("mefa2026", number, OneStage(), "last")
    return Protocol(name="mefa2026", attacks=(attack,), **judged)


def _standard(budget: Budget) -> Protocol:
    """Every kind of attack, the worst image by image: transfer, BPDA-PGD, APGD on cross-entropy and
    DLR, DiffHammer and targeted APGD through the chain, Square.
    """
    preset = {"steps": 100, "replicates": 20, "judge_replicates": 150}
    number = budget.over(**preset)
    sizes = (number["steps"], number["step_size"], number["replicates"])
    return Protocol(
        name="standard",
        attacks=standard_attacks(budget.threat, *sizes),
        ensemble=True,
        **budget.judged("standard", number, AsDeployed(), SELECTED),
    )


PROTOCOLS: dict[str, Callable[[Budget], Protocol]] = {
    "quick": _quick,
    "hill2021": _hill2021,
    "lifecycle2022": _lifecycle2022,
    "mefa2026": _mefa2026,
    "standard": _standard,
}


def get_protocol(name: str, **budget: Any) -> Protocol:
    """Return a preset, with some of its numbers replaced.

    Args:
        name: a name in `PROTOCOLS`.
        **budget: fields of `Budget`: norm, eps, bits, steps, step_size, replicates,
            judge_replicates, selection_replicates, verdict, alpha, looks.
            A changed number shows in every table's footnote; the name stays.

    Raises:
        UsageError: an unknown name or number, or one out of range.
    """
    if name not in PROTOCOLS:
        raise UsageError(f"unknown protocol {name!r}; choose one of {', '.join(PROTOCOLS)}.")
    known = {f.name for f in dataclasses.fields(Budget)}
    for key in budget:
        if key not in known:
            raise UsageError(
                f"unknown protocol setting {key!r}; it has {', '.join(sorted(known))}."
            )
    return PROTOCOLS[name](Budget(**budget))


def load_protocol(path: str | Path) -> Protocol:
    """Read a protocol from a TOML file, as `Protocol.save` writes it.

    Raises:
        UsageError: no such file, no TOML, an unknown kind or key, by its path, or a value that
            does not fit.
    """
    try:
        plain = tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"the protocol file {path} cannot be read ({error}).") from error
    found = build({"kind": "Protocol"} | plain, _kinds(), str(path))
    if not isinstance(found, Protocol):
        raise UsageError(f"{path} holds no protocol; its kind must be Protocol.")
    return found


def restore_protocol(plain: dict[str, Any], kinds: Iterable[type] = ()) -> Protocol:
    """Return the protocol that `describe` made `plain` of; a `KeptModel` stands for each model.

    Args:
        plain: from `describe`, or a run's settings.
        kinds: frozen dataclasses of your own that it may hold, such as an attack.

    Raises:
        UsageError: it holds something unknown, or is no protocol of this version.
    """
    known = _kinds() | {kind.__name__: kind for kind in kinds}
    try:
        found = build(plain, known, "protocol", models=True)
    except UsageError as error:
        raise UsageError(
            f"this run is of another version, or holds a class of yours, which load_run takes in "
            f"kinds=[…] ({str(error).rstrip('.')})."
        ) from error
    if not isinstance(found, Protocol) or describe(found) != plain:
        raise UsageError("these settings hold no protocol of this version; run it again.")
    return found


def _kinds() -> dict[str, type]:
    """Return every kind of setting that a protocol may hold, by name; also those registered."""
    entries = [entry.make for entry in attacks.ATTACKS.values()]
    parts = [*entries, *attacks.GRADIENTS.values(), *attacks.LOSSES.values()]
    parts += [getattr(attacks, name) for name in attacks.__all__]
    found = [Protocol, Selection, *VERDICTS.values(), *parts]
    return {k.__name__: k for k in found if isinstance(k, type) and dataclasses.is_dataclass(k)}
