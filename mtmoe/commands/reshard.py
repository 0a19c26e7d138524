"""Lay a training checkpoint out anew: a file of experts for each expert-parallel process, or one file for all.

Training resumes from any layout at any other, so this is for moving checkpoints, and for programs that read only
fairseq's single file.

Examples:
  mtmoe reshard runs/my/checkpoints/checkpoint_last.pt /scratch/checkpoint_of_8 --expert-parallel-size 8
  mtmoe reshard runs/my/checkpoints/checkpoint_12_3400 single.pt
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.add_argument(
        "source", type=Path, metavar="SOURCE", help="sharded checkpoint (directory) or fairseq's file (.pt)"
    )
    parser.add_argument("target", type=Path, metavar="TARGET", help="directory to make, or file to write or replace")
    parser.add_argument(
        "--expert-parallel-size",
        type=int,
        metavar="N",
        help="write a directory with N files of experts; N divides the number of experts. Default: one file",
    )
    parser.add_argument("--no-optimizer", action="store_true", help="leave out the optimiser's state")


def run(args: argparse.Namespace) -> int:
    """Write the checkpoint; returns the exit status."""
    # Imported here: torch takes seconds, and --help should not.
    from mtmoe.checkpoint.sharded import reshard
    from mtmoe.errors import CheckpointError

    places = args.expert_parallel_size
    if places is not None and places < 1:
        raise CheckpointError(f"--expert-parallel-size {places} must be at least 1")
    if not args.source.exists():
        raise CheckpointError(f"{args.source} does not exist; give a sharded checkpoint or fairseq's file (.pt)")
    reshard(args.source, args.target, places, optimizer=not args.no_optimizer)
    layout = "one file" if places is None else f"{places} file{'s' * (places > 1)} of experts"
    print(f"{args.target}: {layout}")
    return 0
