"""Learning energies by maximum likelihood, and classifiers."""
