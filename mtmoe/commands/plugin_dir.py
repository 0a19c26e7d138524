"""Print the folder to give to fairseq's commands as --user-dir.

Example: fairseq-train DATA --user-dir $(mtmoe plugin-dir) --task mtmoe_translation --arch mtmoe_transformer_tiny …
"""

from __future__ import annotations

import argparse

from mtmoe.training.preset import plugin_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """There are none."""


def run(args: argparse.Namespace) -> int:
    """Print the folder."""
    print(plugin_folder())
    return 0
