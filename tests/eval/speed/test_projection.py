"""What the published protocol would take follows from what was measured."""

from __future__ import annotations

import pytest
import torch

from ebm_defense.energies.conv import ConvEnergySettings
from ebm_defense.eval.speed.projection import Passes, PublishedCost, measure_passes
from ebm_defense.eval.speed.roofline import LAYOUTS

CPU = torch.device("cpu")


def test_the_published_protocol_costs_what_is_known_of_it():
    assert PublishedCost().chains(drop_broken=False) == (52 * 15, 300)
    dropped = PublishedCost(verifications=0.0, robust=0.5, broken_after=0.5)
    assert dropped.chains(drop_broken=True) == (0.75 * 52 * 15, 0)
    chains = (52 * 15 * 1500 + 2 * 225_000) / 1000
    free, passes = Passes(0.0, 0.0), Passes(look=3.0, verdict=7.0)
    assert PublishedCost().seconds(1000.0, free, drop_broken=False) == pytest.approx(chains)
    whole = chains + 52 * 15 * 3.0 + 300 * 7.0
    assert PublishedCost().seconds(1000.0, passes, drop_broken=False) == pytest.approx(whole)


def test_classifiers_are_measured_both_ways_as_published_and_as_ours(monkeypatch):
    monkeypatch.setitem(LAYOUTS, "tiny", ConvEnergySettings(channels=1, image_size=8, width=2))
    state = torch.random.get_rng_state()
    found = measure_passes("tiny", 0.01, CPU)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert set(found) == {True, False}
    assert all(seconds > 0 for passes in found.values() for seconds in passes)
