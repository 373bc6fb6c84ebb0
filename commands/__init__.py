"""The command line: one file a command, each command a dataclass."""
