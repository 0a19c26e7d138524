"""``python -m mtmoe`` is the ``mtmoe`` command."""

import sys

from mtmoe.cli import main

if __name__ == "__main__":
    sys.exit(main())
