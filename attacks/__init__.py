"""What an attacker does: a threat model × a gradient × a loss × an optimiser."""

from ebm_defense.attacks.apgd import APGD, TargetedAPGD
from ebm_defense.attacks.base import Attack, Proposal
from ebm_defense.attacks.diffhammer import DiffHammer
from ebm_defense.attacks.gradients import Identity
from ebm_defense.attacks.losses import DLR, LOSSES, CrossEntropy, Margin, TargetedDLR
from ebm_defense.attacks.pgd import PGD
from ebm_defense.attacks.spsa import SPSA, ScoreFree
from ebm_defense.attacks.square import Square
from ebm_defense.attacks.threat import ThreatModel
from ebm_defense.attacks.transfer import Transfer

__all__ = [
    "APGD",
    "DLR",
    "LOSSES",
    "PGD",
    "SPSA",
    "Attack",
    "CrossEntropy",
    "DiffHammer",
    "Identity",
    "Margin",
    "Proposal",
    "ScoreFree",
    "Square",
    "TargetedAPGD",
    "TargetedDLR",
    "ThreatModel",
    "Transfer",
]
