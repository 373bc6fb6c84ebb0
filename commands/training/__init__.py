"""Commands that learn a part of a defense, and put parts together."""
