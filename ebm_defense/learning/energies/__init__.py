"""Learning an energy: where chains begin, what moves the weights, and recipes by name."""
