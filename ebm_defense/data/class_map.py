"""Which output of a classifier each class folder is."""

from __future__ import annotations

import json
import re
import unicodedata
from pathlib import Path
from typing import Any

from ebm_defense.errors import UsageError

NUMBERS = "numbers"
SYNSET = re.compile(r"n\d{8}\b")
"""A class of WordNet, as ImageNet's folders are named."""


def mapped(names: list[str], class_map: str | None) -> tuple[list[int], tuple[str, ...]]:
    """Return the output of each class, and the names of all outputs as far as they are known.

    Args:
        names: of the class folders, in order.
        class_map: None for the place in that order; "numbers" where the folders are named by their
            output; or a file: JSON of name → output, of output → name or [synset, name] (as Keras
            has ImageNet's), or of a list of names in the outputs' order; or text with one name a
            line, in that order, which may begin with ImageNet's synset (n01440764 tench).

    Raises:
        UsageError: a class that the map lacks, two classes of one output, or no such file.
    """
    if class_map is None:
        return list(range(len(names))), tuple(names)
    known = _by_number(names) if class_map == NUMBERS else _read(Path(class_map).expanduser())
    for name in names:
        if name not in known:
            some = ", ".join(list(known)[:3])
            raise UsageError(
                f"the class map {class_map} lacks the class folder {name!r}; it has {len(known)} "
                f"names such as {some}."
            )
    outputs = [known[name] for name in names]
    if len(set(outputs)) < len(outputs):
        twice = next(n for n in names if outputs.count(known[n]) > 1)
        raise UsageError(
            f"the class map {class_map} gives the output of {twice!r} to another class too."
        )
    shown = {output: name for name, output in reversed(known.items())}
    shown |= dict(zip(outputs, names, strict=True))
    return outputs, tuple(shown.get(i, str(i)) for i in range(max(shown) + 1))


def _by_number(names: list[str]) -> dict[str, int]:
    for name in names:
        if not name.isdecimal():
            raise UsageError(
                f"class map {NUMBERS!r} wants class folders named by numbers, not {name!r}; give a "
                "file that maps names."
            )
    return {name: int(name) for name in names}


def _read(path: Path) -> dict[str, int]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        plain = json.loads(text) if path.suffix == ".json" else text.rstrip().splitlines()
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UsageError(f"the class map {path} cannot be read ({error}).") from error
    known = _from_plain(plain)
    if not known or any(output < 0 for output in known.values()):
        raise UsageError(
            f"the class map {path} must map names to outputs from 0, outputs to names, or list "
            "names in the order of the outputs."
        )
    return known


def _from_plain(plain: Any) -> dict[str, int]:
    """Return name → output of any form that is in use; empty where it is none."""
    if isinstance(plain, dict):
        if all(isinstance(v, int) and not isinstance(v, bool) for v in plain.values()):
            return {unicodedata.normalize("NFC", str(k)): v for k, v in plain.items()}
        pairs = [(int(k), v) for k, v in plain.items() if str(k).isdecimal()]
        return _named(pairs) if len(pairs) == len(plain) else {}
    return _named(list(enumerate(plain))) if isinstance(plain, list) else {}


def _named(pairs: list[tuple[int, Any]]) -> dict[str, int]:
    """Return every name of each output, and the synset that a line begins with."""
    known: dict[str, int] = {}
    for output, names in pairs:
        for name in [names] if isinstance(names, str) else list(names):
            synset = SYNSET.match(str(name))
            for key in (str(name).strip(), synset.group() if synset else ""):
                known.setdefault(unicodedata.normalize("NFC", key), output)
    known.pop("", None)
    return known
