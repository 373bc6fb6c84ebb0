"""What an attacker does: a threat model × a gradient × a loss × an optimiser."""

from ebm_defense.attacks.advgan import AdvGAN
from ebm_defense.attacks.art_adapter import ArtAttack
from ebm_defense.attacks.base import Attack, Proposal
from ebm_defense.attacks.catalogue import ATTACKS, make_attack
from ebm_defense.attacks.foolbox_adapter import FoolboxAttack
from ebm_defense.attacks.gradients import Identity
from ebm_defense.attacks.losses import CrossEntropy
from ebm_defense.attacks.pgd import PGD
from ebm_defense.attacks.threat import ThreatModel
from ebm_defense.attacks.torchattacks_adapter import TorchattacksAttack
from ebm_defense.attacks.transfer import Transfer

__all__ = [
    "ATTACKS",
    "PGD",
    "AdvGAN",
    "ArtAttack",
    "Attack",
    "CrossEntropy",
    "FoolboxAttack",
    "Identity",
    "Proposal",
    "ThreatModel",
    "TorchattacksAttack",
    "Transfer",
    "make_attack",
]
