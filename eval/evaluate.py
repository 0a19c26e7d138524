#!/usr/bin/env python
"""Score a model on every direction; the same as `mtmoe evaluate`. See --help."""

import sys

from mtmoe.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
