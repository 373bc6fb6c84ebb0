"""Figures of runs, and pictures of images on their way."""
