"""Translate text from arguments, a file or standard input, a line at a time.

Examples:
  mtmoe translate --model runs/demo --from en --to de "Open the file"
  mtmoe translate --model model --from eng_Latn --to ron_Latn --input notes.en --output notes.ro
  cat notes.en | mtmoe translate --model model --from en --to mk > notes.mk
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TextIO

from mtmoe.errors import ConfigError, DataError
from mtmoe.files import replacing

CHUNK = 2000
"""Lines that are read, sorted by length and translated together."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "text", nargs="*", default=[], metavar="TEXT", help="text to translate, each argument by itself"
    )
    source.add_argument("--input", type=Path, metavar="FILE", help="read lines from FILE; default: standard input")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write lines to FILE; default: standard output")
    parser.add_argument(
        "--model",
        type=Path,
        required=True,
        metavar="MODEL",
        help="model folder, fairseq checkpoint (.pt), or folder of a run, whose best checkpoint is taken",
    )
    parser.add_argument(
        "--data", type=Path, metavar="DATA", help="prepared data of a checkpoint that lies apart from it"
    )
    parser.add_argument("--from", dest="source", required=True, metavar="LANG", help="source language: de or deu_Latn")
    parser.add_argument("--to", dest="target", required=True, metavar="LANG", help="target language: de or deu_Latn")
    parser.add_argument("--beam", type=int, default=4, metavar="N", help="hypotheses kept; 1 is greedy and fastest")
    parser.add_argument("--length-penalty", type=float, default=1.0, metavar="X", help="above 1 favours long output")
    parser.add_argument("--max-tokens", type=int, default=2048, metavar="N", help="source tokens in a batch")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="number format of the model"
    )
    parser.add_argument("--device", default="cpu", metavar="NAME", help="torch device to run on")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads; default: torch's choice")


def run(args: argparse.Namespace) -> int:
    """Translate; returns the exit status."""
    # Imported here: torch takes seconds, and wrong options or a missing file should be told at once.
    from mtmoe.checkpoint import locate_model
    from mtmoe.inference import Translator

    interactive = not args.text and args.input is None and sys.stdin.isatty()
    counting = not args.text and not interactive and sys.stderr.isatty()
    done = 0
    found = locate_model(args.model)
    if found != args.model:
        print(f"mtmoe translate: using {found}", file=sys.stderr)
    try:
        # Lines are read while they are translated, so a pipe is a stream and a big file never lies in memory.
        with _input(args) as lines:
            translator = Translator.load(
                found, data=args.data, device=args.device, dtype=args.dtype, threads=args.threads
            )
            with _output(args.output) as output:
                for chunk in _chunks(lines, 1 if interactive else CHUNK):
                    results = translator.translate(
                        chunk,
                        args.source,
                        args.target,
                        beam=args.beam,
                        max_tokens=args.max_tokens,
                        length_penalty=args.length_penalty,
                    )
                    output.writelines(f"{line}\n" for line in results)
                    output.flush()
                    done += len(chunk)
                    if counting:
                        print(f"\rmtmoe translate: {done} lines", end="", file=sys.stderr)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    finally:
        if counting and done:
            print(file=sys.stderr)
    return 0


@contextmanager
def _input(args: argparse.Namespace) -> Iterator[Iterator[str]]:
    """The lines to translate: arguments, else a file, else standard input."""
    if args.text:
        yield iter(args.text)
    elif args.input is None:
        yield _decoded(sys.stdin.buffer, "standard input")
    else:
        try:
            file = args.input.open("rb")
        except OSError as error:
            raise DataError(f"{args.input} cannot be read: {error.strerror}") from error
        with file:
            yield _decoded(file, str(args.input))


def _decoded(lines: Iterable[bytes], name: str) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        try:
            yield line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{name}, line {number}: no valid UTF-8 at byte {error.start + 1}: {error.reason}"
            ) from error


@contextmanager
def _output(path: Path | None) -> Iterator[TextIO]:
    """Where translations go; a file appears whole at the end, or not at all."""
    if path is None:
        sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
        yield sys.stdout
    else:
        with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
            yield file


def _chunks(lines: Iterator[str], size: int) -> Iterator[list[str]]:
    while chunk := list(islice(lines, size)):
        yield chunk
