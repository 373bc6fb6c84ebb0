"""Attacks, gradients and losses named in text: `name` or `name(parameter=value, …)`."""

from __future__ import annotations

import ast
import difflib
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

from ebm_defense.errors import UsageError

T = TypeVar("T")
NESTED = re.compile(r"[a-z][a-z0-9-]*\(.*\)", re.DOTALL)


class Spec(NamedTuple):
    """A name and the parameters behind it."""

    name: str
    parameters: dict[str, Any]


def parse(text: str) -> Spec:
    """Parse `name(parameter=value, …)`.

    A value is a Python literal or, as text, another `name(parameter=value, …)`: nothing is run.

    Raises:
        UsageError: another form.
    """
    name, bracket, rest = text.partition("(")
    if not bracket:
        return Spec(text, {})
    if not rest.endswith(")"):
        raise UsageError(f"{text!r} opens a bracket that it does not close.")
    return Spec(name, parameters(rest[:-1], text))


def parameters(text: str, source: str) -> dict[str, Any]:
    """Parse `parameter=value, …`.

    Args:
        text: the parameters, without brackets.
        source: what a mistake is said to be in.
    """
    line = f"f({text})"
    try:
        call = ast.parse(line, mode="eval").body
        if not isinstance(call, ast.Call) or not _plain(call):
            raise ValueError
        return {str(k.arg): _value(k.value, line) for k in call.keywords}
    except (SyntaxError, ValueError) as error:
        raise UsageError(
            f"{source!r} must have the form name(parameter=value, …) with plain values: numbers, "
            "quoted strings, True, False, None, lists of them, or another name(parameter=value, …)."
        ) from error


def _plain(call: ast.Call) -> bool:
    named = all(keyword.arg is not None for keyword in call.keywords)
    return isinstance(call.func, ast.Name) and not call.args and named


def _value(node: ast.expr, line: str) -> Any:
    text = ast.get_source_segment(line, node) or ""
    if not NESTED.fullmatch(text):
        return ast.literal_eval(node)
    parse(text)
    return text


def write(values: Mapping[str, Any], source: str) -> str:
    """Return parameters as `parameters` reads them, by name.

    Raises:
        UsageError: a value that is no literal.
    """
    for name, value in values.items():
        try:
            ast.literal_eval(repr(value))
        except (SyntaxError, ValueError) as error:
            raise UsageError(
                f"{name} of {source} must be a plain value: a number, a string, True, False, None, "
                f"or a list of them, not {value!r}."
            ) from error
    return ", ".join(f"{name}={value!r}" for name, value in sorted(values.items()))


def lookup(registry: Mapping[str, T], name: str, what: str) -> T:
    """Return a registry's entry, or raise a `UsageError` that names those near it."""
    if name not in registry:
        raise UsageError(f"unknown {what} {name!r}; {near(name, registry)}.")
    return registry[name]


def near(name: str, names: Iterable[str]) -> str:
    """Say which names there are: those near `name` where there are many, else all."""
    known = list(names)
    if len(known) <= 12:
        return f"choose one of {', '.join(known)}"
    close = difflib.get_close_matches(name, known, 4, 0.4)
    return f"near it are {', '.join(close)}" if close else "`ebm-defense attacks` lists them all"


def parameter_names(make: Callable[..., Any]) -> frozenset[str]:
    """Return the names of the parameters that a class or function takes by name."""
    kinds = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    found = inspect.signature(make).parameters.values()
    return frozenset(p.name for p in found if p.kind in kinds)


def make(registry: Mapping[str, Callable[..., T]], text: str, what: str) -> T:
    """Make an entry of a registry from `name(parameter=value, …)`.

    Raises:
        UsageError: an unknown name, a parameter it does not take, or a value that does not fit.
    """
    spec = parse(text)
    maker = lookup(registry, spec.name, what)
    refuse_unknown(spec.parameters, parameter_names(maker), f"{what} {spec.name}")
    try:
        return maker(**spec.parameters)
    except (OverflowError, TypeError) as error:
        raise UsageError(f"the settings of {text!r} do not fit: {error}.") from error


def refuse_unknown(given: Iterable[str], known: Iterable[str], what: str) -> None:
    """Refuse the first setting that is not among the known ones."""
    allowed = sorted(known)
    for name in given:
        if name not in allowed:
            takes = f"it takes {', '.join(allowed)}" if allowed else "it takes none"
            raise UsageError(f"{what} takes no {name!r}; {takes}.")
