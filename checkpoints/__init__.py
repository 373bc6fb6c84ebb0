"""Small weights that ship with the package, each with a model card and its hashes."""
