"""What an attacker does: a threat model × a gradient × a loss × an optimiser."""

from ebm_defense.attacks.base import Attack, Proposal
from ebm_defense.attacks.gradients import Identity
from ebm_defense.attacks.losses import CrossEntropy
from ebm_defense.attacks.pgd import PGD
from ebm_defense.attacks.threat import ThreatModel
from ebm_defense.attacks.transfer import Transfer

__all__ = ["PGD", "Attack", "CrossEntropy", "Identity", "Proposal", "ThreatModel", "Transfer"]
