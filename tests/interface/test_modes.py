"""Modules are found wherever they are held, and left as they were."""

from __future__ import annotations

import functools
import types

import pytest
import torch
from torch import nn

from ebm_defense import PurifiedClassifier, UsageError
from ebm_defense.interface.modes import called_by, evaluating, modules_of
from ebm_defense.purifiers.baselines import NoPurifier

X = torch.rand((3, 4), generator=torch.Generator().manual_seed(0))


def network():
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)).train()


class Private:
    def __init__(self):
        self._net = network()

    def __call__(self, x):
        return self._net(x)


class Slotted:
    __slots__ = ("net",)

    def __init__(self):
        self.net = network()

    def __call__(self, x):
        return self.net(x)


class InATuple(nn.Module):
    def __init__(self):
        super().__init__()
        self._nets = (network(),)

    def forward(self, x):
        return self._nets[0](x)


class OfAClass:
    net = network()


HOME = types.ModuleType("home")
HOME.net = network()


def of_a_class(x):
    return OfAClass.net(x)


def of_a_module(x):
    return HOME.net(x)


def nested(depth, net):
    if not depth:
        return net
    inner = nested(depth - 1, net)
    return lambda x: 1.0 * inner(x)


STATIC = {
    "private": Private,
    "slots": Slotted,
    "a tuple": InATuple,
    "a class": lambda: of_a_class,
    "a module": lambda: of_a_module,
    "containers": lambda: functools.partial(
        lambda held, x: held["a"][0]["b"](x), {"a": [{"b": network()}]}
    ),
    "functions in functions": lambda: nested(6, network()),
}


@pytest.mark.parametrize("held", STATIC)
def test_modules_are_found_where_they_are_held(held):
    use = STATIC[held]()
    found = {type(module) for module in modules_of(use)}
    assert {nn.BatchNorm1d, nn.Dropout} <= found
    with evaluating(use):
        assert torch.equal(use(X), use(X))


@functools.lru_cache
def cached():
    return network()


def test_what_only_a_call_shows_is_found_by_calling_and_left_as_it_was():
    def use(x):
        return cached()(x)

    assert not modules_of(use)
    before = {name: value.clone() for name, value in cached().state_dict().items()}
    generator = torch.get_rng_state()
    with evaluating(use, trying=lambda number: use(X)):
        assert torch.equal(use(X), use(X))
        assert not cached().training
    assert all(module.training for module in cached().modules())
    assert all(torch.equal(value, before[name]) for name, value in cached().state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)


def test_a_module_that_a_call_makes_anew_is_none_in_use():
    def use(x):
        return nn.Dropout(0.5)(cached()(x))

    found = called_by(lambda number: use(X))
    assert {id(module) for module in cached().modules()} == {id(module) for module in found}
    assert called_by(lambda number: use(X), known=found) == []


def test_what_fails_shows_what_was_called_before():
    net = network()

    def fail(number):
        net(X)
        raise RuntimeError

    assert len(called_by(fail)) == len(list(net.modules()))
    assert int(net[1].num_batches_tracked) == 0


def test_lazy_modules_without_weights_are_refused_in_a_sentence():
    with pytest.raises(UsageError, match="call the model once"), evaluating(nn.LazyLinear(2)):
        pass


def test_a_defense_s_hidden_modules_are_not_trained_by_an_evaluation():
    defense = PurifiedClassifier(lambda x: cached()(x.flatten(1)), NoPurifier(), 1)
    with evaluating(defense, trying=lambda n: defense.try_out(X[:, None, None], n)):
        assert not cached().training
