"""The pretended GPU refuses what a GPU refuses, and its graphs are graphs."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn


def test_tensors_know_their_device(gpus):
    x = torch.zeros(2, device="cuda:1")
    assert x.device == torch.device("cuda:1")
    assert (x + 1).device == x.new_ones(3).device == x[0].device == copy.deepcopy(x).device
    assert torch.arange(3, device="cuda").device == torch.device("cuda:0")
    assert x.cpu().device == x.to("cpu").device == torch.zeros(1).to(x.cpu()).device
    assert torch.zeros(1).to(x).device == torch.zeros(1).cuda(1).device == x.device
    assert type(x.cpu()) is torch.Tensor
    assert x.to(torch.float64).device == x.device
    net = nn.Linear(2, 2).to("cuda:1")
    assert isinstance(net.weight, nn.Parameter)
    assert net(x).device == copy.deepcopy(net).weight.device == x.device
    (slope,) = torch.autograd.grad(net(x).sum(), net.weight)
    assert slope.device == x.device


@pytest.mark.parametrize("other", ["cpu", "cuda:1"])
def test_devices_are_not_mixed(other, gpus):
    x, y = torch.ones(2, device="cuda:0"), torch.ones(2, device=other)
    with pytest.raises(RuntimeError, match="same device"):
        x + y
    with pytest.raises(RuntimeError, match="same device"):
        nn.Linear(2, 2).to(other)(x)
    assert (x + torch.tensor(1.0)).device == x.device  # but for numbers of the host
    y.copy_(x)
    with pytest.raises(TypeError, match="numpy"):
        x.numpy()


def test_a_graph_does_again_what_was_recorded_to_the_same_memory(gpus):
    x = torch.zeros(3, device="cuda")
    graph = torch.cuda.CUDAGraph()
    factor = 2.0
    with torch.cuda.graph(graph, stream=torch.cuda.Stream(), capture_error_mode="thread_local"):
        y = (x + 1.0) * factor
        x.add_(y.view(3))
    x.fill_(1.0)
    factor = 100.0  # which no graph sees
    graph.replay()
    assert x.tolist() == [5.0] * 3
    graph.replay()
    assert x.tolist() == [17.0] * 3


def test_nothing_is_captured_on_the_stream_of_another_device(gpus):
    x = torch.zeros(1, device="cuda:0")
    graph, elsewhere = torch.cuda.CUDAGraph(), torch.cuda.Stream(torch.device("cuda:1"))
    with torch.cuda.graph(graph, stream=elsewhere, capture_error_mode="thread_local"):
        x.add_(1.0)
    x.zero_()
    graph.replay()
    assert x.tolist() == [0.0]


@pytest.mark.parametrize(
    "wait", [lambda x: x.sum().item(), lambda x: bool(x.any()), torch.Tensor.cpu]
)
def test_the_host_may_not_wait_within_a_capture(wait, gpus):
    x = torch.zeros(1, device="cuda")
    with (
        pytest.raises(RuntimeError, match="capturing"),
        torch.cuda.graph(
            torch.cuda.CUDAGraph(), stream=torch.cuda.Stream(), capture_error_mode="thread_local"
        ),
    ):
        wait(x)
