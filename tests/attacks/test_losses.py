"""What an attacker maximises."""

import pytest
import torch
from torch.nn import functional as F

from ebm_defense import UsageError
from ebm_defense.attacks import CrossEntropy

MANUAL = {
    "logits": lambda z: z.mean(0).log_softmax(-1),
    "softmax": lambda z: z.softmax(-1).mean(0).log(),
    "log_softmax": lambda z: z.log_softmax(-1).mean(0),
}


@pytest.mark.parametrize("average", MANUAL)
def test_the_cross_entropy_of_each_average_is_the_manual_one(average):
    logits = 3.0 * torch.randn((5, 4, 3), generator=torch.Generator().manual_seed(0)).double()
    labels = torch.tensor([0, 1, 2, 1])
    expected = -MANUAL[average](logits)[torch.arange(4), labels]
    torch.testing.assert_close(CrossEntropy(average=average)(logits, labels), expected)


def test_averaged_log_softmax_is_the_mean_of_the_replicates_losses():
    logits = torch.randn((5, 4, 3), generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 1])
    each = torch.stack([F.cross_entropy(z, labels, reduction="none") for z in logits])
    torch.testing.assert_close(CrossEntropy(average="log_softmax")(logits, labels), each.mean(0))


@pytest.mark.parametrize("average", ["votes", "median"])
def test_what_has_no_gradient_is_refused_as_a_loss(average):
    with pytest.raises(UsageError, match=average):
        CrossEntropy(average=average)
