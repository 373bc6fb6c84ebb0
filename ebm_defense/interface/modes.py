"""Modules as an evaluation needs them, and afterwards as they were."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import islice
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ebm_defense.errors import UsageError

DEPTH = 8
"""How far modules are looked for behind functions that call functions."""
MANY = 1000
"""How many entries of a list or a dict are looked at."""
LIBRARIES = ("torch", "torchvision", "numpy", "builtins", "functools", "inspect")
"""Whose functions and objects lead to no module of the user's."""


Try = Callable[[int], object]
"""Uses some parts once, briefly, and is told which time this is."""
OWN = frozenset(vars(nn.Module()))
"""Attributes that every module has: hooks, parameters, children."""


@contextmanager
def evaluating(*parts: object, trying: Try | None = None) -> Iterator[None]:
    """Put every module in evaluation mode for a block, and leave nothing behind.

    In the block dropout is off and batch statistics are the learned ones, and neither an
    inference_mode around it nor weights made under one forbid gradients. Afterwards every module's
    mode, every buffer, and every parameter's `requires_grad` and `grad` are as they were.

    Args:
        *parts: modules, and functions that use some.
        trying: uses the parts once, briefly; modules are found, too, that only a call shows.

    Raises:
        UsageError: lazy modules that have no weights yet.
    """
    with torch.inference_mode(False), ExitStack() as stack:
        known = modules_of(*parts)
        _refuse_lazy(known)
        _enter(stack, known)
        if trying is not None:
            _enter(stack, called_by(trying, known))
        yield


def _refuse_lazy(modules: Iterable[nn.Module]) -> None:
    for module in modules:
        if any(is_lazy(value) for value in module.parameters(recurse=False)):
            raise UsageError(
                f"a {type(module).__name__} of the model waits for a first batch to have weights; "
                "call the model once before it is evaluated."
            )


def _enter(stack: ExitStack, modules: list[nn.Module]) -> None:
    for prepared in (_usable, _kept, in_eval_mode):
        stack.enter_context(prepared(modules))


def called_by(trying: Try, known: Iterable[nn.Module] = ()) -> list[nn.Module]:
    """Return the modules that calls of something use again and again, besides those known.

    Whatever holds them, a cache of functions for instance, a call shows them. One that a call makes
    anew, such as the dropout of `nn.Dropout()(x)`, is no module of evaluation mode in use either.

    Args:
        trying: uses them; it is called twice, without a trace in buffers or torch's generators.
        known: modules that are not returned.
    """
    told = {id(module) for module in known}
    calls: list[dict[int, nn.Module]] = []
    buffers: dict[int, tuple[Tensor, Tensor]] = {}

    def look(module: nn.Module, inputs: object) -> None:
        if id(module) not in told:
            calls[-1].setdefault(id(module), module)  # held, so that its id stays its own
            for buffer in module.buffers():
                buffers.setdefault(id(buffer), (buffer, buffer.detach().clone()))

    hook = nn.modules.module.register_module_forward_pre_hook(look)
    try:
        # What fails here fails again where it is refused in a sentence.
        with suppress(Exception), torch.no_grad(), _forked():
            for number in range(2):
                calls.append({})
                trying(number)
    finally:
        hook.remove()
        _put_back(buffers.values())
    again = [module for key, module in calls[0].items() if all(key in call for call in calls)]
    return [module for module in modules_of(*again) if id(module) not in told]


def _forked() -> Any:
    return torch.random.fork_rng(range(torch.cuda.device_count()))


def _put_back(buffers: Iterable[tuple[Tensor, Tensor]]) -> None:
    for buffer, copy in buffers:
        if not torch.equal(buffer, copy):
            with torch.no_grad():
                buffer.copy_(copy)


@contextmanager
def in_eval_mode(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Put modules in evaluation mode for a block, each by itself, and back as they were."""
    # A frozen ScriptModule has no mode any more.
    training = [module for module in modules if getattr(module, "training", False)]
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


def own_dtype(part: object) -> torch.dtype | None:
    """Return the one dtype of the weights in use; None where there are none, or several."""
    weights = (w for m in modules_of(part) for w in m.parameters(recurse=False))
    found = {weight.dtype for weight in weights if weight.is_floating_point()}
    return found.pop() if len(found) == 1 else None


def _used(part: object) -> list[object]:
    """Return what a function, a container or another object refers to."""
    if isinstance(part, list | tuple):
        return list(part[:MANY])
    if isinstance(part, dict):
        return list(islice(part.values(), MANY))
    if isinstance(part, functools.partial):
        return [part.func, *part.args, *part.keywords.values()]
    if isinstance(part, MethodType):
        return [part.__self__, part.__func__]
    if isinstance(part, FunctionType):
        return [*_closed_over(part), *(part.__defaults__ or ()), getattr(part, "__wrapped__", None)]
    held = {name: v for name, v in getattr(part, "__dict__", {}).items() if name not in OWN}
    slots = (name for kind in type(part).__mro__ for name in _slots(kind))
    code = (getattr(type(part), name, None) for name in ("__call__", "forward"))
    return [*held.values(), *(getattr(part, name, None) for name in slots), *code]


def _slots(kind: type) -> tuple[str, ...]:
    named = vars(kind).get("__slots__", ())
    return (named,) if isinstance(named, str) else tuple(named)


def _closed_over(function: FunctionType) -> list[object]:
    try:
        outer = inspect.getclosurevars(function)
    except ValueError:  # a cell that is empty yet
        return []
    used = [*outer.nonlocals.values(), *outer.globals.values()]
    # Of a Python module or a class, what the function names of it.
    named = (vars(part) for part in used if inspect.ismodule(part) or inspect.isclass(part))
    return [*used, *(held[n] for held in named for n in function.__code__.co_names if n in held)]


def _may_lead_on(value: object) -> bool:
    """Whether a value is a module or may refer to one: no number, tensor or part of a library."""
    if isinstance(value, nn.Module | MethodType | functools.partial | list | tuple | dict):
        return True
    if inspect.isclass(value) or inspect.ismodule(value):
        return False
    if not (hasattr(value, "__dict__") or any(map(_slots, type(value).__mro__))):
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
        for module, name, buffer, _ in buffers:
            module._buffers[name] = buffer
        _put_back((buffer, copy) for *_, buffer, copy in buffers)
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
