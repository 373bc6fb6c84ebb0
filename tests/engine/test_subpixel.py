"""Input gradients by blocks are the convolution's own, for every geometry and every blocking."""

from __future__ import annotations

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from ebm_defense.engine.convolutional import input_gradient
from ebm_defense.engine.subpixel import LANES, Blocks, Convolution, best_blocks

PUBLISHED = [(3, 32, 3, 1, 1, 32), (32, 64, 4, 2, 1, 32), (64, 128, 4, 2, 1, 16)]


def gradients(conv: Convolution, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shape = (conv.fan_out, conv.fan_in, conv.kernel, conv.kernel)
    weight = torch.randn(shape, generator=generator, dtype=dtype)
    x = torch.zeros(2, conv.fan_in, conv.size, conv.size, dtype=dtype, requires_grad=True)
    y = F.conv2d(x, weight, None, conv.stride, conv.padding)
    g = torch.randn(y.shape, generator=generator, dtype=dtype)
    return weight, g, torch.autograd.grad(y, x, g)[0]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    fans=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    kernel=st.integers(1, 5),
    stride=st.integers(1, 3),
    padding=st.integers(0, 2),
    size=st.integers(4, 13),
    times=st.integers(1, 3),
    offset=st.integers(0, 8),
)
def test_blocks_are_the_input_gradient(fans, kernel, stride, padding, size, times, offset):
    conv = Convolution(*fans, kernel, stride, padding, size)
    assume(size + 2 * padding >= kernel > padding and kernel >= stride)
    block = times * stride
    blocks = Blocks(conv, block, offset % block)
    weight, g, expected = gradients(conv)
    padded, padding = blocks.pad(g)
    found = F.conv2d(padded, blocks.weight(weight), None, blocks.stride, padding)
    torch.testing.assert_close(blocks.assemble(found), expected, rtol=0, atol=1e-12)


def test_published_layers_are_cut_where_that_saves_products():
    chosen = [best_blocks(Convolution(*shape)) for shape in PUBLISHED[:2]]
    assert [(b.block, b.offset) for b in chosen] == [(2, 0), (2, 1)]
    # 8 x 8 pixels in 5 x 5 blocks of two waste more than the library does.
    assert best_blocks(Convolution(128, 256, 4, 2, 1, 8)) is None


def test_a_gpus_tiles_are_filled_by_larger_blocks():
    """Of the published first layer 48 output channels instead of 12, at fewer idle lanes."""
    first = Convolution(*PUBLISHED[0])
    there, here = best_blocks(first, "cuda"), best_blocks(first)
    assert (there.block, here.block) == (4, 2)
    tile = LANES["cuda"]
    assert there.products(tile) < here.products(tile)
    weight, g, expected = gradients(first)
    padded, padding = there.pad(g)
    found = F.conv2d(padded, there.weight(weight), None, there.stride, padding)
    torch.testing.assert_close(there.assemble(found), expected, rtol=0, atol=1e-12)


def test_either_way_back_is_the_same():
    for shape in [(1, 4, 3, 1, 1, 12), (4, 8, 4, 2, 1, 12), (64, 8, 4, 2, 1, 7)]:
        conv = Convolution(*shape)
        weight, g, expected = gradients(conv)
        found = input_gradient(conv, weight)(g)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
