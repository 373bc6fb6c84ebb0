"""Spies on what an attack does."""

import pytest
import torch


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
def listen():
    return Listener
