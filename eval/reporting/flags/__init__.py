"""Signs that a number should not be believed."""
