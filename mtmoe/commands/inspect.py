"""Show what a model is: size, layers, experts, languages, what was done to it, and figures.

Examples:
  mtmoe inspect runs/demo/model
  mtmoe inspect --verify copied/model      # also compare every file with its checksum
  mtmoe inspect --json runs/demo/checkpoints/checkpoint_best.pt
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from mtmoe.errors import CheckpointError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.add_argument(
        "model", type=Path, metavar="MODEL", help="model folder, checkpoint (.pt), or folder of a run"
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="compare all files with their checksums; without it, weights of more than 1 GB only by their size",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DATA",
        help="prepared data that a checkpoint was trained on; default: the one beside it or that it names",
    )


def run(args: argparse.Namespace) -> int:
    """Describe; returns the exit status."""
    from mtmoe.checkpoint import locate_model, open_model
    from mtmoe.checkpoint.checksums import CHECKSUMS
    from mtmoe.checkpoint.folder import is_model_folder
    from mtmoe.checkpoint.inspection import describe, description_text

    found = locate_model(args.model)
    if args.verify and not is_model_folder(found):
        raise CheckpointError(f"--verify needs a model folder with checksums; {found} is a checkpoint")
    if args.verify and not (found / CHECKSUMS).is_file():
        raise CheckpointError(
            f"{found} is of version 1, without checksums; write it anew: mtmoe convert {found} --output {found}"
        )
    if found != args.model:
        print(f"mtmoe inspect: using {found}", file=sys.stderr)
    about = describe(open_model(found, args.data, verify=True if args.verify else None))
    if args.json:
        print(json.dumps(about, ensure_ascii=False, indent=2))
        return 0
    print(description_text(about))
    if args.verify:
        print("checksums    all files are as they were written")
    return 0
