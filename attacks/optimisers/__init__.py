"""How an attacker moves through the threat model: one file an optimiser."""
