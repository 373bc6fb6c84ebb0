"""The one exception a user's mistake raises."""


class UsageError(ValueError):
    """A setting, file or image is not what it must be; the message says what to do."""


class FailedRunError(RuntimeError):
    """A run could not be brought to its end, by no mistake of the user's; the message says why."""
