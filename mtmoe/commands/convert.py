"""Turn a model from one format into another: fairseq checkpoint, portable model folder, Hugging Face folder.

The format of what is given is recognised. A model folder holds safetensors and JSON, nothing that runs code when
opened; it is what all other commands work on. A fairseq checkpoint made from one has the same weights to the bit, and
training goes on from it with fairseq-train's --finetune-from-model. Hugging Face's classes are NllbMoe and, for dense
models, M2M100 (NLLB, M2M-100), of transformers 4.57.

Examples:
  mtmoe convert runs/demo --output runs/demo/model
  mtmoe convert runs/demo/checkpoints/checkpoint_best.pt --output runs/demo/model --evaluation runs/demo/evaluation.json
  mtmoe convert runs/demo/model --dtype bf16 --output runs/demo/model-bf16
  mtmoe convert runs/demo/model --to fairseq --output runs/tuned/start.pt
  mtmoe convert nllb-200-distilled-600M --output models/nllb-600M
  mtmoe convert models/nllb-600M --to huggingface --output nllb-back
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mtmoe.errors import CheckpointError

if TYPE_CHECKING:
    from mtmoe.checkpoint import StoredModel

FORMATS = ("folder", "fairseq", "huggingface")
DTYPES = ("fp32", "bf16", "fp16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.add_argument(
        "model",
        type=Path,
        metavar="MODEL",
        help="fairseq checkpoint (.pt), sharded checkpoint (directory), folder of a run, whose best checkpoint is "
        "taken, model folder, or folder of a Hugging Face model",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="PATH", help="folder or file to write or replace")
    parser.add_argument("--to", choices=FORMATS, default="folder", help="format to write")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="number format of the weights; default: as they are (fp32 in fairseq)"
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DATA",
        help="prepared data that a checkpoint was trained on; default: the one beside it or that it names",
    )
    parser.add_argument(
        "--evaluation",
        type=Path,
        metavar="JSON",
        help="evaluation.json of this very model, for the figures of its card",
    )


def run(args: argparse.Namespace) -> int:
    """Convert; returns the exit status."""
    # Imported here: torch takes seconds, and --help should not.
    from mtmoe.checkpoint import folder
    from mtmoe.checkpoint.card import read_figures
    from mtmoe.checkpoint.tensors import DTYPES as TYPES
    from mtmoe.checkpoint.tensors import cast, count_of, dtypes_of

    if args.to == "fairseq" and args.output.suffix != ".pt":
        raise CheckpointError(f"--output {args.output}: a fairseq checkpoint is a file that ends with .pt")
    with contextlib.ExitStack() as stack:
        model = _open(args, stack)
        if args.dtype is not None and list(dtypes_of(model.tensors)) != [args.dtype]:
            was = ", ".join(dtypes_of(model.tensors))
            model = replace(model, tensors=cast(model.tensors, TYPES[args.dtype]))
            model = model.after("cast", to=args.dtype, **{"from": was})
        if args.evaluation is not None:
            model = replace(model, figures=read_figures(args.evaluation))
        if args.to == "folder":
            folder.write_folder(args.output, model)
        elif args.to == "fairseq":
            from mtmoe.checkpoint.fairseq_export import write_fairseq_checkpoint

            write_fairseq_checkpoint(args.output, model)
        else:
            from mtmoe.checkpoint.huggingface_export import write_huggingface

            if not write_huggingface(args.output, model):
                print(
                    f"mtmoe convert: {args.output} has no tokeniser: transformers has none that numbers pieces as "
                    "dict.txt does. Give ids, or use mtmoe translate",
                    file=sys.stderr,
                )
            if model.languages.decoder_start == "tag":
                print(
                    "mtmoe convert: the decoder of this model begins with the target's tag: call "
                    "generate(decoder_start_token_id=ID_OF_THE_TAG)",
                    file=sys.stderr,
                )
        parameters = sum(count_of(model.tensors, name) for name in model.tensors)
    known = model.languages.languages
    print(f"{args.output}: {parameters:,} parameters, {_languages(known)}")
    return 0


def _open(args: argparse.Namespace, stack: contextlib.ExitStack) -> StoredModel:
    from mtmoe.checkpoint import huggingface, locate_model, open_model

    if huggingface.is_huggingface(args.model):
        return stack.enter_context(huggingface.reading(args.model))
    found = locate_model(args.model)
    if found != args.model:
        print(f"mtmoe convert: using {found}", file=sys.stderr)
    return open_model(found, args.data, verify=True)  # all of it is read anyway


def _languages(known: tuple[str, ...]) -> str:
    return f"languages {', '.join(known)}" if len(known) <= 30 else f"{len(known)} languages"
