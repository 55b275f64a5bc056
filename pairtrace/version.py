"""The package version, alone in a file so that every floor may read it."""

__version__ = "0.1.0"
