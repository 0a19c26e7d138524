"""mtmoe: train, shrink and serve multilingual Mixture-of-Experts translation models."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("mtmoe")
except PackageNotFoundError:  # a checkout on PYTHONPATH that nobody installed
    __version__ = "0.0.0+uninstalled"

__all__ = ["__version__"]
