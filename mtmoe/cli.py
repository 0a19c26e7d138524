"""The ``mtmoe`` command: finds the module of a command, parses, runs, and turns errors into a line of text."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from mtmoe import __version__
from mtmoe.errors import MtmoeError

DESCRIPTION = "Train, shrink and serve multilingual Mixture-of-Experts translation models."

COMMANDS: dict[str, tuple[str, str]] = {
    "prepare": ("mtmoe.commands.prepare", "clean parallel text, train SentencePiece and binarise, from a recipe"),
    "train": ("mtmoe.commands.train", "start fairseq-train with a preset, and resume it"),
    "plan": ("mtmoe.commands.plan", "estimate memory, bytes and time on many GPUs, and recommend a layout"),
    "curves": ("mtmoe.commands.curves", "table and plot of a run's validation losses by direction"),
    "curriculum": ("mtmoe.commands.curriculum", "derive from a run which directions should join training late"),
    "evaluate": ("mtmoe.commands.evaluate", "decode every direction and write chrF++ and BLEU reports"),
    "compare": ("mtmoe.commands.compare", "put two evaluations side by side, with paired significance"),
    "translate": ("mtmoe.commands.translate", "translate text from arguments, a file or standard input"),
    "convert": ("mtmoe.commands.convert", "turn checkpoints into portable model folders, from and to Hugging Face"),
    "reshard": ("mtmoe.commands.reshard", "lay a training checkpoint out for another number of processes"),
    "inspect": ("mtmoe.commands.inspect", "show a model's size, layers, experts, languages, history and figures"),
    "average": ("mtmoe.commands.average", "average the weights of several checkpoints or model folders"),
    "routing": ("mtmoe.commands.routing", "count which experts each direction's tokens choose, by layer"),
    "prune": ("mtmoe.commands.prune", "remove experts that some languages, or all, need least, or merge them"),
    "plugin-dir": ("mtmoe.commands.plugin_dir", "print the folder to give to fairseq as --user-dir"),
}
"""Name of a command -> its module and its line in ``mtmoe --help``."""


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults in the help of each option; examples in the description keep their line breaks."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the words after ``mtmoe``; by default those of the process.

    Returns:
        The exit status: 0 done, 1 an error that a line on standard error explains, 130 interrupted.
        Wrong usage leaves through argparse with 2.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="mtmoe", description=DESCRIPTION, formatter_class=_Formatter)
    parser.add_argument("--version", action="version", version=f"mtmoe {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    named = next((word for word in arguments if not word.startswith("-")), None)
    module = None
    for name, (module_name, summary) in COMMANDS.items():
        # Only the called command is imported: its libraries may take seconds, and --help must not.
        if name == named:
            module = importlib.import_module(module_name)
            command = commands.add_parser(
                name, help=summary, description=module.__doc__, formatter_class=_Formatter, allow_abbrev=False
            )
            module.add_arguments(command)
        else:
            commands.add_parser(name, help=summary)
    args = parser.parse_args(arguments)
    assert module is not None  # argparse has refused an unknown command by now
    try:
        return int(module.run(args))
    except MtmoeError as error:
        print(f"mtmoe {args.command}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"mtmoe {args.command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as in `mtmoe translate … | head`
        sys.stderr.close()
        return 1
