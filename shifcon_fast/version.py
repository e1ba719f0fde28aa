"""The package's version, where files that record it can import it from below."""

__version__ = "0.1.0"
