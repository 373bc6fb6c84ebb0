"""Libraries that only some people need, imported where they are used."""

from __future__ import annotations

import importlib
from typing import Any

from ebm_defense.errors import UsageError


def optional(module: str, package: str, extra: str) -> Any:
    """Import a module that may not be installed.

    Args:
        module: its dotted name.
        package: what pip calls what it is in.
        extra: this package's extra that brings it.

    Raises:
        UsageError: it is not installed; the sentence says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UsageError(
            f"{package} is not installed; pip install 'ebm-defense[{extra}]', "
            f"or pip install {package}."
        ) from error
