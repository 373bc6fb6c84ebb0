"""Learns generators, what infers their latents, and energies, together or one after another."""
