"""Learning a whole defense against attacks on its input."""
