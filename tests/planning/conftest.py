"""Real models of planned shapes are built by the benchmark that compares both; it stands beside the package."""

import sys
from pathlib import Path

ROOT = str(Path(__file__).parents[2])
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)
