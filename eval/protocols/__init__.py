"""An evaluation as a frozen value: the published ones, and what overrides them."""
