"""Which faster arithmetic was shown to be harmless, and for what."""
