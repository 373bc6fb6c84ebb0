"""Modules as an evaluation needs them, and afterwards as they were."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn

DEPTH = 4
"""How far modules are looked for behind functions that call functions."""
LIBRARIES = ("torch", "torchvision", "numpy", "builtins", "functools", "inspect")
"""Whose functions and objects lead to no module of the user's."""


@contextmanager
def evaluating(*parts: object) -> Iterator[None]:
    """Put every module in evaluation mode for a block, and leave nothing behind.

    In the block dropout is off and batch statistics are the learned ones, and neither an
    inference_mode around it nor weights made under one forbid gradients. Afterwards every module's
    mode, every buffer, and every parameter's `requires_grad` and `grad` are as they were.

    Args:
        *parts: modules, and functions that use some.
    """
    modules = modules_of(*parts)
    with torch.inference_mode(False), _usable(modules), _kept(modules), in_eval_mode(modules):
        yield


@contextmanager
def in_eval_mode(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Put modules in evaluation mode for a block, each by itself, and back as they were."""
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def modules_of(*parts: object) -> list[nn.Module]:
    """Return every module within modules, and within the functions and objects that use some."""
    found: list[nn.Module] = []
    seen: set[int] = set()
    waiting = [(part, DEPTH) for part in parts if _may_lead_on(part)]
    while waiting:
        part, depth = waiting.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        if isinstance(part, nn.Module):
            found.append(part)
            waiting += [(inner, DEPTH) for inner in part.children()]
        if depth:
            waiting += [(used, depth - 1) for used in _used(part) if _may_lead_on(used)]
    return found


def _used(part: object) -> list[object]:
    """Return what a function, a container or another object refers to."""
    if isinstance(part, list | tuple):
        return list(part)
    if isinstance(part, dict):
        return list(part.values())
    if isinstance(part, functools.partial):
        return [part.func, *part.args, *part.keywords.values()]
    if isinstance(part, MethodType):
        return [part.__self__, part.__func__]
    if isinstance(part, FunctionType):
        return [*_closed_over(part), *(part.__defaults__ or ()), getattr(part, "__wrapped__", None)]
    # What begins with an underscore in a module is torch's own: hooks, parameters, children.
    return [value for name, value in vars(part).items() if not name.startswith("_")]


def _closed_over(function: FunctionType) -> list[object]:
    try:
        outer = inspect.getclosurevars(function)
    except ValueError:  # a cell that is empty yet
        return []
    return [*outer.nonlocals.values(), *outer.globals.values()]


def _may_lead_on(value: object) -> bool:
    """Whether a value is a module or may refer to one: no number, tensor or part of a library."""
    if isinstance(value, nn.Module | MethodType | functools.partial | list | tuple | dict):
        return True
    if inspect.isclass(value) or inspect.ismodule(value) or not hasattr(value, "__dict__"):
        return False
    home = getattr(value, "__module__", None) or ""
    return home.partition(".")[0] not in LIBRARIES


@contextmanager
def _kept(modules: list[nn.Module]) -> Iterator[None]:
    """Put back buffers and parameters' flags and gradients after a block."""
    places = [(m, name, b) for m in modules for name, b in m._buffers.items() if b is not None]
    buffers = [(m, name, buffer, buffer.detach().clone()) for m, name, buffer in places]
    parameters = {id(p): p for m in modules for p in m._parameters.values() if p is not None}
    flags = [(p, p.requires_grad, p.grad) for p in parameters.values()]
    for parameter, _, _ in flags:
        parameter.grad = None
    try:
        yield
    finally:
        for module, name, buffer, copy in buffers:
            module._buffers[name] = buffer
            if not torch.equal(buffer, copy):
                with torch.no_grad():
                    buffer.copy_(copy)
        for parameter, flag, gradient in flags:
            parameter.requires_grad_(flag)
            parameter.grad = gradient


@contextmanager
def _usable(modules: list[nn.Module]) -> Iterator[None]:
    """Lend modules ordinary copies of weights that were made under inference_mode."""
    lent: list[tuple[dict[str, Any], str, Any]] = []
    for module in modules:
        for kept in (module._parameters, module._buffers):
            for name, value in kept.items():
                if value is not None and value.is_inference():
                    lent.append((kept, name, value))
    try:
        for kept, name, value in lent:
            copy = value.detach().clone()
            whole = isinstance(value, nn.Parameter)
            kept[name] = nn.Parameter(copy, requires_grad=value.requires_grad) if whole else copy
        yield
    finally:
        for kept, name, value in lent:
            kept[name] = value
