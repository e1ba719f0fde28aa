"""The one error that bad data raises."""


class DataError(ValueError):
    """Data that cannot be used. The message names the file and line, what was found and what was wanted."""
