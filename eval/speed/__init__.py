"""How fast chains are here, and what an evaluation will take."""
