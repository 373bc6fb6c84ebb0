"""What an attacker does: a threat model × a gradient × a loss × an optimiser."""

from ebm_defense.attacks.base import Attack, Proposal
from ebm_defense.attacks.catalogue import ATTACKS, make_attack
from ebm_defense.attacks.external.advgan import AdvGAN
from ebm_defense.attacks.external.art_adapter import ArtAttack
from ebm_defense.attacks.external.foolbox_adapter import FoolboxAttack
from ebm_defense.attacks.external.torchattacks_adapter import TorchattacksAttack
from ebm_defense.attacks.external.transfer import Transfer
from ebm_defense.attacks.gradients.base import Gradient, Identity
from ebm_defense.attacks.gradients.full import Full
from ebm_defense.attacks.gradients.registry import GRADIENTS, Auto, make_gradient
from ebm_defense.attacks.gradients.score_free import ScoreFree
from ebm_defense.attacks.gradients.smoothed import Smoothed
from ebm_defense.attacks.gradients.surrogate import Surrogate
from ebm_defense.attacks.losses import DLR, LOSSES, CrossEntropy, Margin, TargetedDLR, Towards
from ebm_defense.attacks.optimisers.apgd import APGD, TargetedAPGD
from ebm_defense.attacks.optimisers.diffhammer import DiffHammer
from ebm_defense.attacks.optimisers.pgd import PGD
from ebm_defense.attacks.optimisers.spsa import SPSA
from ebm_defense.attacks.optimisers.square import Square
from ebm_defense.attacks.threat import ThreatModel

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
    "Auto",
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
    "Towards",
    "Transfer",
    "make_attack",
    "make_gradient",
]
