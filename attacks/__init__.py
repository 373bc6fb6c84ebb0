"""What an attacker does: a threat model × a gradient × a loss × an optimiser."""

from ebm_defense.attacks.advgan import AdvGAN
from ebm_defense.attacks.apgd import APGD, TargetedAPGD
from ebm_defense.attacks.art_adapter import ArtAttack
from ebm_defense.attacks.base import Attack, Proposal
from ebm_defense.attacks.catalogue import ATTACKS, make_attack
from ebm_defense.attacks.diffhammer import DiffHammer
from ebm_defense.attacks.foolbox_adapter import FoolboxAttack
from ebm_defense.attacks.full_gradient import Full
from ebm_defense.attacks.gradient_names import GRADIENTS, make_gradient
from ebm_defense.attacks.gradients import Gradient, Identity
from ebm_defense.attacks.losses import DLR, LOSSES, CrossEntropy, Margin, TargetedDLR
from ebm_defense.attacks.pgd import PGD
from ebm_defense.attacks.smoothed import Smoothed
from ebm_defense.attacks.spsa import SPSA, ScoreFree
from ebm_defense.attacks.square import Square
from ebm_defense.attacks.surrogate import Surrogate
from ebm_defense.attacks.threat import ThreatModel
from ebm_defense.attacks.torchattacks_adapter import TorchattacksAttack
from ebm_defense.attacks.transfer import Transfer

__all__ = [
    "APGD",
    "ATTACKS",
    "DLR",
    "GRADIENTS",
    "LOSSES",
    "PGD",
    "SPSA",
    "AdvGAN",
    "ArtAttack",
    "Attack",
    "CrossEntropy",
    "DiffHammer",
    "FoolboxAttack",
    "Full",
    "Gradient",
    "Identity",
    "Margin",
    "Proposal",
    "ScoreFree",
    "Smoothed",
    "Square",
    "Surrogate",
    "TargetedAPGD",
    "TargetedDLR",
    "ThreatModel",
    "TorchattacksAttack",
    "Transfer",
    "make_attack",
    "make_gradient",
]
