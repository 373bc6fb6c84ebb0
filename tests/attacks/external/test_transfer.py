"""Transfer puts the bare classifier's adversarial images before the defense."""

import pytest
import torch

from ebm_defense import PurifiedClassifier, UsageError
from ebm_defense.attacks import PGD, ThreatModel, Transfer
from ebm_defense.defense import as_defense

ATTACK = PGD(threat=ThreatModel(eps=0.05), steps=3, step_size=0.02, replicates=2)


def images_and_labels():
    generator = torch.Generator().manual_seed(1)
    images = torch.rand((4, 1, 8, 8), generator=generator, dtype=torch.float64)
    return images, torch.arange(4) % 3


def test_transfer_proposes_the_bare_classifiers_adversarial_images(langevin_defense, listen):
    defense, heard = langevin_defense(), listen()
    images, labels = images_and_labels()
    transfer = Transfer(attack=ATTACK, replicates=5)
    returned = transfer.run(defense, images, labels, ids=range(4), seed=9, judge=heard)
    bare = as_defense(defense.classifier)
    expected = ATTACK.run(bare, images, labels, ids=range(4), seed=9)
    (proposal,) = heard.proposals
    assert torch.equal(proposal.images, expected)
    assert torch.equal(returned, expected)
    assert proposal.logits.shape == (5, 4, 3)


def test_transfer_may_come_from_the_undefended_classifier(langevin_defense, two_class):
    undefended = two_class(torch.ones((1, 8, 8), dtype=torch.float64), -32.0)
    defense, (images, labels) = langevin_defense(undefended=undefended), images_and_labels()
    transfer = Transfer(attack=ATTACK, source="undefended")
    expected = ATTACK(undefended, images, labels % 2, seed=4)
    assert torch.equal(transfer(defense, images, labels % 2, seed=4), expected)


def test_transfer_never_purifies_while_it_attacks(two_class, counting_purifier):
    images, labels = images_and_labels()
    classifier = two_class(torch.ones((1, 8, 8), dtype=torch.float64), -32.0)
    defense = PurifiedClassifier(classifier, counting_purifier)
    transfer = Transfer(attack=ATTACK, replicates=3)
    transfer.run(defense, images, labels % 2, ids=range(len(images)), seed=0)
    assert counting_purifier.rows == [3 * len(images)]
    assert transfer.chain_steps(defense) == 3 * counting_purifier.chain_steps


@pytest.mark.parametrize("wrong", [{"replicates": 0}, {"source": "defense"}])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(UsageError, match=str(next(iter(wrong.values())))):
        Transfer(attack=ATTACK, **wrong)
