"""The Fréchet distance is what it is for Gaussians, and is named by its features."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ebm_defense._torchvision import torchvision
from ebm_defense.errors import UsageError
from ebm_defense.eval.frechet import features_of, frechet_distance, inception_fid


def draw(count: int, mean: float, spread: float, seed: int, width: int = 3) -> torch.Tensor:
    z = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    return mean + spread * z.double()


def exact(x: torch.Tensor) -> torch.Tensor:
    """Return draws whose mean is 0 and covariance the identity, without error."""
    x = x - x.mean(0)
    return x @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov()).T)


def test_of_gaussians_it_is_the_closed_form() -> None:
    z = exact(draw(500, 0.0, 1.0, 0))
    # ‖μ₁ − μ₂‖² + Σ(s₁ − s₂)² where covariances share their axes.
    assert frechet_distance(z, z) == pytest.approx(0.0, abs=1e-9)
    assert frechet_distance(z, z + 0.5) == pytest.approx(3 * 0.25)
    assert frechet_distance(z, 3.0 * z) == pytest.approx(3 * 4.0)
    scaled = z * torch.tensor([1.0, 2.0, 0.5])
    assert frechet_distance(z, scaled) == pytest.approx(0 + 1 + 0.25)


def test_it_is_symmetric_and_that_of_torch_fidelity() -> None:
    torchvision("transforms")
    metric = pytest.importorskip("torch_fidelity.metric_fid", reason="the extra `fid` is missing")
    generator = torch.Generator().manual_seed(2)
    mix = torch.randn(6, 6, generator=generator).double()
    a, b = draw(300, 0.0, 1.0, 3, 6) @ mix, draw(400, 0.3, 1.2, 4, 6)
    found = frechet_distance(a, b)
    assert frechet_distance(b, a) == pytest.approx(found)
    statistics = [metric.fid_features_to_statistics(x) for x in (a, b)]
    theirs = metric.fid_statistics_to_metric(*statistics, verbose=False)
    assert found == pytest.approx(next(iter(theirs.values())), rel=1e-6)


def test_fewer_features_than_images_are_allowed_and_single_images_are_not() -> None:
    few = draw(4, 0.0, 1.0, 0, 10)
    assert frechet_distance(few, few) == pytest.approx(0.0, abs=1e-6)
    with pytest.raises(UsageError, match="two images"):
        frechet_distance(few[:1], few)


def test_a_classifiers_features_are_what_its_last_layer_sees() -> None:
    body = nn.Sequential(nn.Flatten(), nn.Linear(4, 5), nn.Dropout(0.9), nn.ReLU())
    network = nn.Sequential(body, nn.Linear(5, 2)).train()
    x = torch.rand(401, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    found = features_of(network)(x)
    assert network.training
    torch.testing.assert_close(found, body.eval()(x).detach())
    assert not network[1]._forward_pre_hooks
    with pytest.raises(UsageError, match="no linear layer"):
        features_of(nn.Flatten())


def test_without_inceptions_weights_fid_is_refused_in_a_sentence(monkeypatch) -> None:
    torchvision("transforms")
    fidelity = pytest.importorskip("torch_fidelity", reason="the extra `fid` is missing")

    def fails(**_: object) -> None:
        raise OSError("no network\nat all")

    monkeypatch.setattr(fidelity, "calculate_metrics", fails)
    with pytest.raises(UsageError, match=r"FID needs Inception's weights.*\(no network\)"):
        inception_fid(torch.rand(2, 1, 8, 8), torch.rand(2, 1, 8, 8))


def test_fid_is_asked_of_torch_fidelity_in_three_channels_of_bytes(monkeypatch) -> None:
    torchvision("transforms")
    fidelity = pytest.importorskip("torch_fidelity", reason="the extra `fid` is missing")

    def fake(*, input1, input2, **_: object) -> dict[str, float]:
        assert (len(input1), len(input2)) == (3, 2)
        assert input1[0].shape == (3, 8, 8)
        assert input1[0].dtype == torch.uint8
        assert int(input2[0].max()) == 255
        return {"frechet_inception_distance": 7.0}

    monkeypatch.setattr(fidelity, "calculate_metrics", fake)
    assert inception_fid(torch.rand(3, 1, 8, 8), torch.full((2, 3, 8, 8), 1.2)) == 7.0
