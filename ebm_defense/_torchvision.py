"""The one door to torchvision, open even where its compiled operators do not load."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_library: list[Any] = []


def torchvision(submodule: str) -> ModuleType:
    """Import `torchvision.<submodule>`.

    The registry's torchvision beside a CPU build of torch fails at import because two compiled
    detection operators are missing (pytorch/vision#9085). Data sets and transforms never call
    them, so their schemas are declared and the import is tried again.
    """
    try:
        return importlib.import_module(f"torchvision.{submodule}")
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
    _declare_operators()
    return importlib.import_module(f"torchvision.{submodule}")


def _declare_operators() -> None:
    import torch

    library = torch.library.Library("torchvision", "DEF")
    for schema in _SCHEMAS:
        library.define(schema)
    _library.append(library)  # a collected library takes its schemas with it
