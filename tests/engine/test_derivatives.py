"""Hessian-vector products are those of the whole Hessian, whatever convolutions are made of."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ebm_defense.engine.derivatives import hessian_product

SHAPE = (2, 2, 6, 6)


def conv(*arguments: int, **options) -> nn.Module:
    torch.manual_seed(0)
    return nn.Conv2d(*arguments, **options).double()


class Own(nn.Module):
    """A convolution whose weights are made of the image itself."""

    def forward(self, x: Tensor) -> Tensor:
        weight = x.mean((0, 2, 3)).view(1, 2, 1, 1) ** 2
        return F.conv2d(x, weight)


MAPS = {
    "plain": lambda: conv(2, 3, 3),
    "strided": lambda: conv(2, 3, 4, stride=2, padding=1),
    "uneven": lambda: conv(2, 3, (3, 2), stride=(2, 1), padding=(1, 0)),
    "remainder": lambda: conv(2, 3, 3, stride=2),
    "dilated": lambda: conv(2, 3, 2, dilation=2),
    "grouped": lambda: conv(2, 4, 3, groups=2, bias=False),
    "padded by a word": lambda: conv(2, 3, 3, padding="same"),
    "by keywords": lambda: lambda x: F.conv2d(input=x, weight=torch.ones(1, 2, 3, 3).to(x)),
    "of images": Own,
}


@pytest.mark.parametrize("name", MAPS)
def test_a_product_is_the_hessians(name):
    first = MAPS[name]()

    def energy(x: Tensor) -> Tensor:
        return first(x).tanh().square().flatten(1).sum(1)

    generator = torch.Generator().manual_seed(0)
    x, v = torch.randn((2, *SHAPE), generator=generator, dtype=torch.float64)
    whole = torch.autograd.functional.hessian(lambda x: energy(x).sum(), x)
    expected = torch.einsum("abcdefgh,efgh->abcd", whole, v)
    torch.testing.assert_close(hessian_product(energy, x, v), expected)


def test_two_convolutions_in_a_row_and_layouts_do_not_matter():
    net = nn.Sequential(conv(2, 3, 3), nn.Tanh(), conv(3, 1, 4), nn.Flatten(0))
    x, v = torch.randn((2, *SHAPE), generator=torch.Generator().manual_seed(0)).double()
    expected = hessian_product(net, x, v)
    last = net.to(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(hessian_product(last, x, v), expected)
    assert all(p.grad is None for p in net.parameters())
