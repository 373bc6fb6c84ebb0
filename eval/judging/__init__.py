"""Verdicts on fresh random draws, and what may be said of them."""
