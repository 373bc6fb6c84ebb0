"""Networks of a user's own, named on the command line as `package.module:factory(argument=…)`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any

from torch import nn

from ebm_defense.attacks.spec import parse
from ebm_defense.classifiers import Normalized, normalized
from ebm_defense.errors import UsageError
from ebm_defense.interface.preprocessing import preprocessing_of
from ebm_defense.storage.state_dicts import load_weights


def factory(spec: str) -> Callable[[], Any]:
    """Import `package.module:name` or `package.module:name(argument=value, …)`.

    A module is looked for where Python looks, and then in the current folder.

    Returns:
        A function without arguments that makes the part; what it raises is a `UsageError`.

    Raises:
        UsageError: another form, nothing of that name, or what cannot be called.
    """
    module, colon, rest = spec.partition(":")
    if not colon or not module:
        raise UsageError(f"{spec!r} must have the form package.module:factory(argument=value, …).")
    name, arguments = parse(rest)
    try:
        found = reduce(getattr, name.split("."), _import(module))
    except (ImportError, AttributeError, SyntaxError) as error:
        raise UsageError(f"{spec!r} cannot be imported ({error}).") from error
    if not callable(found):
        raise UsageError(f"{spec!r} is not callable; name a function or class that makes the part.")
    return lambda: _made(found, arguments, spec)


def _import(module: str) -> Any:
    # An installed program does not look for modules where it is called, as python itself does.
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    return importlib.import_module(module)


def _made(make: Callable[..., Any], arguments: dict[str, Any], spec: str) -> Any:
    try:
        return make(**arguments)
    except UsageError:
        raise
    except Exception as error:  # anybody's code raises anything
        reason = (str(error).splitlines() or [""])[0].rstrip(".")
        raise UsageError(f"{spec!r} failed: {type(error).__name__}: {reason}.") from error


def make_module(spec: str, weights: Path | None, what: str) -> nn.Module:
    """Call a user's factory, and load weights into what it makes.

    Raises:
        UsageError: as `factory` and `load_weights`, or what is no `nn.Module`.
    """
    module = factory(spec)()
    if not isinstance(module, nn.Module):
        raise UsageError(f"{spec} made no nn.Module for the {what}, but {type(module).__name__}.")
    if weights is not None:
        load_weights(module, weights)
    return module.eval()


def scaled_classifier(
    classifier: nn.Module,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    size: int | None,
) -> nn.Module:
    """Return a user's classifier on images in [0, 1], by the scale that is given or that it tells.

    Raises:
        UsageError: a mean without a std, or a scale for what `normalized` has scaled already.
    """
    if (mean is None) != (std is None):
        raise UsageError("give --mean and --std together.")
    if (mean, size) == (None, None):
        return _told(classifier)
    if isinstance(classifier, Normalized):
        raise UsageError("the factory returns normalized(…) already; leave --mean and --std out.")
    return normalized(classifier, mean or (0.0,), std or (1.0,), size)


def _told(classifier: nn.Module) -> nn.Module:
    """Scale a classifier as its own pretrained_cfg says; most have none, and take [0, 1]."""
    if not hasattr(classifier, "pretrained_cfg"):
        return classifier
    found = preprocessing_of(classifier)
    print(f"the classifier's own settings say mean {found.mean} and std {found.std}")
    return found.wrap(classifier)
