"""The common corruptions, made or read from files."""
