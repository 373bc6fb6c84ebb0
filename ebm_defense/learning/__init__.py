"""Learning energies, denoisers, latent models, classifiers and whole defenses."""
