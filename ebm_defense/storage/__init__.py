"""Files: written whole or not at all, hashed, read into settings, weights and defenses."""
