"""The published classifier, and other people's behind a normalisation."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ebm_defense.classifiers import WideResNet, WideResNetSettings, normalized
from ebm_defense.errors import UsageError


def published() -> WideResNet:
    with torch.device("meta"):
        return WideResNet()


def norm_shapes(name: str, width: int) -> dict[str, tuple[int, ...]]:
    kinds = ("weight", "bias", "running_mean", "running_var")
    return {f"{name}.{k}": (width,) for k in kinds} | {f"{name}.num_batches_tracked": ()}


def conv_shapes(name: str, *weight: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": weight, f"{name}.bias": weight[:1]}


def published_shapes() -> dict[str, tuple[int, ...]]:
    """The keys and shapes of the published file, written out from its description."""
    shapes = conv_shapes("conv1", 16, 3, 3, 3)
    fan_in = 16
    for layer, width in ((1, 160), (2, 320), (3, 640)):
        for block in range(4):
            name = f"layer{layer}.{block}"
            shapes |= norm_shapes(f"{name}.bn1", fan_in)
            shapes |= conv_shapes(f"{name}.conv1", width, fan_in, 3, 3)
            shapes |= norm_shapes(f"{name}.bn2", width)
            shapes |= conv_shapes(f"{name}.conv2", width, width, 3, 3)
            if block == 0:
                shapes |= conv_shapes(f"{name}.shortcut.0", width, fan_in, 1, 1)
            fan_in = width
    return shapes | norm_shapes("bn1", 640) | conv_shapes("linear", 10, 640)


def test_wrn_28_10_has_the_published_keys_and_shapes():
    found = {k: tuple(v.shape) for k, v in published().state_dict().items()}
    assert found == published_shapes()
    assert len(found) == 183


def test_wrn_28_10_has_the_published_number_of_parameters():
    assert sum(p.numel() for p in published().parameters()) == 36_489_290


def test_the_stride_is_on_the_second_convolution_and_the_shortcut():
    for stage, stride in (("layer1", 1), ("layer2", 2), ("layer3", 2)):
        first = published().get_submodule(f"{stage}.0")
        assert first.conv1.stride == (1, 1)
        assert first.conv2.stride == (stride, stride)
        assert first.shortcut[0].stride == (stride, stride)


def reference_forward(state: dict[str, torch.Tensor], x: torch.Tensor, blocks: int):
    """A pre-activation wide ResNet in plain functional calls."""

    def conv(name, x, stride=1, padding=1):
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], stride, padding)

    def relu_norm(name, x):
        mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
        return F.relu(
            F.batch_norm(x, mean, var, state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-5)
        )

    x = conv("conv1", x)
    for layer in (1, 2, 3):
        for block in range(blocks):
            name, stride = f"layer{layer}.{block}", 2 if layer > 1 and block == 0 else 1
            out = conv(f"{name}.conv1", relu_norm(f"{name}.bn1", x))
            out = conv(f"{name}.conv2", relu_norm(f"{name}.bn2", out), stride)
            shortcut = f"{name}.shortcut.0"
            x = out + (conv(shortcut, x, stride, 0) if f"{shortcut}.weight" in state else x)
    x = F.avg_pool2d(relu_norm("bn1", x), 8).flatten(1)
    return F.linear(x, state["linear.weight"], state["linear.bias"])


def test_forward_matches_a_reference_on_32_pixels():
    torch.manual_seed(0)
    network = WideResNet(WideResNetSettings(depth=16, widen=2)).double().eval()
    for name, buffer in network.named_buffers():
        if name.endswith("running_mean"):
            buffer.uniform_(-0.2, 0.2)
        if name.endswith("running_var"):
            buffer.uniform_(0.2, 1.0)
    x = torch.rand(2, 3, 32, 32, dtype=torch.float64) * 2 - 1
    with torch.no_grad():
        logits = network(x)
    torch.testing.assert_close(logits, reference_forward(network.state_dict(), x, blocks=2))
    assert float((logits[0] - logits[1]).abs().max()) > 1e-3


@pytest.mark.parametrize(("channels", "classes", "size"), [(1, 10, 28), (3, 7, 8), (2, 2, 16)])
def test_other_images_and_classes_work(channels, classes, size):
    shape = WideResNetSettings(channels=channels, classes=classes, depth=10, widen=1)
    network = WideResNet(shape).eval()
    assert network(torch.zeros(2, channels, size, size)).shape == (2, classes)
    assert network(torch.zeros(0, channels, size, size)).shape == (0, classes)


@pytest.mark.parametrize("depth", [4, 9, 11, 27, 0, -2])
def test_impossible_depths_are_refused(depth):
    with pytest.raises(UsageError, match=str(depth)):
        WideResNetSettings(depth=depth)


def test_normalized_is_mean_and_std_one_a_channel():
    mean, std = (0.1, 0.5, 0.9), (0.5, 0.25, 2.0)
    x = torch.rand(2, 3, 4, 4)
    expected = torch.stack([(x[:, c] - mean[c]) / std[c] for c in range(3)], dim=1)
    torch.testing.assert_close(normalized(nn.Identity(), mean, std)(x), expected)


def test_normalized_with_one_number_covers_every_channel():
    x = torch.rand(2, 3, 4, 4)
    torch.testing.assert_close(normalized(nn.Identity(), 0.5, 0.5)(x), 2 * x - 1)


@pytest.mark.parametrize("size", [8, (6, 10), (3, 3)])
def test_normalized_resizes_before_it_normalises(size):
    x = torch.rand(2, 3, 5, 5)
    pair = (size, size) if isinstance(size, int) else size
    resized = F.interpolate(x, pair, mode="bilinear", antialias=True, align_corners=False)
    found = normalized(nn.Identity(), 0.3, 0.7, size)(x)
    torch.testing.assert_close(found, (resized - 0.3) / 0.7)
    assert found.shape == (2, 3, *pair)


def test_images_of_the_wanted_size_are_not_resampled():
    x = torch.rand(2, 1, 5, 5)
    assert torch.equal(normalized(nn.Identity(), 0.0, 1.0, 5)(x), x)


def test_resizing_a_flat_image_keeps_it_flat():
    x = torch.full((1, 3, 4, 4), 0.25)
    torch.testing.assert_close(
        normalized(nn.Identity(), 0.0, 1.0, 9)(x), torch.full((1, 3, 9, 9), 0.25)
    )


def test_gradients_pass_through_normalisation_and_resizing():
    x = torch.rand(2, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(normalized(nn.Identity(), 0.2, 0.4, 7).double(), x)


def test_mean_and_std_are_buffers_and_not_parameters():
    wrapped = normalized(nn.Identity(), 0.1, 0.2).double()
    assert list(wrapped.parameters()) == []
    assert wrapped.mean.dtype == torch.float64
    assert set(wrapped.state_dict()) == {"mean", "std"}


@pytest.mark.parametrize("std", [0.0, -1.0, math.nan, (0.5, 0.0, 0.5), (0.5, math.nan, 0.5)])
def test_a_std_that_is_not_above_zero_is_refused(std):
    with pytest.raises(UsageError, match="std"):
        normalized(nn.Identity(), 0.5, std)


def test_a_normalisation_of_pixels_up_to_255_is_refused():
    with pytest.raises(UsageError, match="divide it, and std, by 255"):
        normalized(nn.Identity(), (123.7, 116.3, 103.5), (58.4, 57.1, 57.4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_normalised_classifier_in_half_precision(dtype):
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).to(dtype)
    images = torch.rand((2, 3, 2, 2), dtype=dtype)
    assert normalized(net, 0.5, 0.25)(images).dtype == dtype
