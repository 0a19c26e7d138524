#!/usr/bin/env python
"""Put two evaluations side by side; the same as `mtmoe compare`. See --help."""

import sys

from mtmoe.cli import main

if __name__ == "__main__":
    sys.exit(main(["compare", *sys.argv[1:]]))
