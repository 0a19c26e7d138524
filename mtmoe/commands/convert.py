"""Turn a fairseq checkpoint into a portable model folder: safetensors and JSON, nothing that runs code when opened.

Example:
  mtmoe convert runs/demo/checkpoints/checkpoint_best.pt --output runs/demo/model
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mtmoe.errors import CheckpointError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.add_argument(
        "checkpoint",
        type=Path,
        metavar="CHECKPOINT",
        help="fairseq checkpoint (.pt), sharded checkpoint (directory), or folder of a run, whose best one is taken",
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DATA",
        help="prepared data it was trained on; default: the one beside it or that it names",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="model folder to write or replace")


def run(args: argparse.Namespace) -> int:
    """Convert; returns the exit status."""
    # Imported here: torch takes seconds, and --help should not.
    from mtmoe.checkpoint import locate_model, open_model
    from mtmoe.checkpoint.folder import is_model_folder, write_folder

    found = locate_model(args.checkpoint)
    if is_model_folder(found):
        raise CheckpointError(f"{found} is a model folder already")
    if found != args.checkpoint:
        print(f"mtmoe convert: using {found}", file=sys.stderr)
    model = open_model(found, args.data)
    write_folder(args.output, model)
    parameters = sum(tensor.numel() for tensor in model.tensors.values())
    print(f"{args.output}: {parameters:,} parameters, languages {', '.join(model.languages.languages)}")
    return 0
