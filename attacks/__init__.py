"""What an attacker does: a threat model × a gradient × a loss × an optimiser."""

from ebm_defense.attacks.base import Attack, Proposal
from ebm_defense.attacks.full_gradient import Full
from ebm_defense.attacks.gradient_names import GRADIENTS, make_gradient
from ebm_defense.attacks.gradients import Gradient, Identity
from ebm_defense.attacks.losses import CrossEntropy
from ebm_defense.attacks.pgd import PGD
from ebm_defense.attacks.smoothed import Smoothed
from ebm_defense.attacks.surrogate import Surrogate
from ebm_defense.attacks.threat import ThreatModel
from ebm_defense.attacks.transfer import Transfer

__all__ = [
    "GRADIENTS",
    "PGD",
    "Attack",
    "CrossEntropy",
    "Full",
    "Gradient",
    "Identity",
    "Proposal",
    "Smoothed",
    "Surrogate",
    "ThreatModel",
    "Transfer",
    "make_gradient",
]
