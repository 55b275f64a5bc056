"""pairtrace: which preference pairs taught the model this behaviour?"""

from pairtrace.version import __version__

__all__ = ["__version__"]
