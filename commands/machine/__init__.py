"""Commands that ask what this machine can do."""
