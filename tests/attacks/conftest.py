"""Spies on what an attack does."""

import pytest
import torch

from ebm_defense import Purifier


class CountingPurifier(Purifier):
    """Adds a little noise and remembers how many images each call purified."""

    chain_steps = 7

    def __init__(self):
        super().__init__()
        self.rows = []

    def purify(self, images, noise):
        self.rows.append(len(images))
        return images + 0.01 * noise.normal(0, images)


class Listener:
    """A judge that remembers every proposal and strikes the images it was told to."""

    def __init__(self, strikes=None):
        self.strikes = strikes or {}
        self.proposals = []

    def __call__(self, proposal):
        self.proposals.append(proposal._replace(images=proposal.images.clone()))
        struck = torch.tensor(self.strikes.get(proposal.step, []), dtype=torch.long)
        return ~torch.isin(proposal.rows, struck)


@pytest.fixture
def counting_purifier():
    return CountingPurifier()


@pytest.fixture
def listen():
    return Listener
