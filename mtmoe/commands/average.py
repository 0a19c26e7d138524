"""Average the weights of several checkpoints or model folders of one training, such as its last ones.

Examples:
  mtmoe average --last 3 runs/demo --output runs/demo/averaged
  mtmoe average runs/demo/checkpoints/checkpoint_3_7000.pt runs/demo/checkpoints/checkpoint_3_8000.pt --output averaged
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mtmoe.errors import CheckpointError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.add_argument(
        "models", type=Path, nargs="+", metavar="MODEL", help="checkpoints or model folders; with --last one run"
    )
    parser.add_argument("--output", "-o", type=Path, required=True, metavar="FOLDER", help="model folder to write")
    parser.add_argument(
        "--last", type=int, metavar="N", help="the N checkpoints of a run that have the most updates behind them"
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DATA",
        help="prepared data that checkpoints were trained on; default: the one beside them or that they name",
    )


def run(args: argparse.Namespace) -> int:
    """Average; returns the exit status."""
    from mtmoe.checkpoint import locate_model, open_model
    from mtmoe.checkpoint.average import average, last_checkpoints
    from mtmoe.checkpoint.folder import write_folder

    paths: list[Path] = args.models
    if args.last is not None:
        if len(paths) != 1:
            raise CheckpointError(f"--last takes the folder of one run, not {len(paths)} paths")
        if args.last < 2:
            raise CheckpointError(f"--last {args.last}: an average needs two checkpoints or more")
        paths = last_checkpoints(paths[0], args.last)
        print(f"mtmoe average: {', '.join(path.name for path in paths)}", file=sys.stderr)
    if len({path.resolve() for path in paths}) != len(paths):
        raise CheckpointError(f"the same model is given twice: {', '.join(map(str, paths))}")
    models = {str(path): open_model(locate_model(path), args.data, verify=True) for path in paths}
    write_folder(args.output, average(models))
    print(f"{args.output}: the mean of {len(models)} models")
    return 0
