"""How an attacker differentiates a stochastic defense: one file a gradient."""
