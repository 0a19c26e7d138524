"""Count which experts the tokens of each direction choose, by layer, while the model reads text with its translations.

Writes one JSON file of sums and counts: choices of first and second place, the gate's probability where an expert is
chosen and over all tokens, and the gates of CMR. So it gives, for each of them, token counts, share of first choices,
mean confidence and load. Files over other text of the same model add up with --merge.

Examples:
  mtmoe routing runs/demo/model runs/demo/data --output routing.json
  mtmoe routing model data --directions en-de,de-en --limit 100 --output some.json
  mtmoe routing nllb data --by language --output routing.json
  mtmoe routing --merge some.json others.json --output all.json
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mtmoe.errors import ConfigError
from mtmoe.languages import parse_direction

if TYPE_CHECKING:
    from mtmoe.routing_table import RoutingTable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.add_argument("model", nargs="?", type=Path, metavar="MODEL", help="model folder, checkpoint or run folder")
    parser.add_argument("text", nargs="?", type=Path, metavar="DATA", help="prepared data with the text")
    parser.add_argument("--merge", nargs="+", type=Path, metavar="FILE", help="add up these files; needs no MODEL")
    parser.add_argument("--data", type=Path, metavar="DATA", help="the same by name")
    parser.add_argument(
        "--by",
        choices=("direction", "language"),
        default="direction",
        help="rows of the file: directions, or source languages in the encoder and target languages in the decoder, "
        "whose file stays small with thousands of directions",
    )
    parser.add_argument("--split", choices=("test", "valid"), default="valid", help="text to read")
    parser.add_argument("--directions", default="all", metavar="A-B,…", help="directions to read, as en-de,de-en")
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="segments of a direction; 0 takes all")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="file to write")
    parser.add_argument("--max-tokens", type=int, default=4096, metavar="N", help="tokens in a batch")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="number format")
    parser.add_argument("--device", default="cpu", metavar="NAME", help="torch device to run on")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads; default: torch's choice")


def run(args: argparse.Namespace) -> int:
    """Count or merge, write the file and print a summary; returns the exit status."""
    if (args.model is None) == (args.merge is None):
        raise ConfigError("give either a MODEL to watch or --merge FILE … to add up")
    try:
        table = _merge(args.merge) if args.merge else _collect(args)
    except ValueError as error:  # an option that is out of range, or a dense model
        raise ConfigError(str(error)) from error
    table.save(args.output)
    _show(table)
    print(f"mtmoe routing: wrote {args.output}", file=sys.stderr)
    return 0


def _merge(paths: list[Path]) -> RoutingTable:
    from mtmoe.routing_table import RoutingTable

    table = RoutingTable.load(paths[0])
    for path in paths[1:]:
        table = table.merge(RoutingTable.load(path))
    return table


def _collect(args: argparse.Namespace) -> RoutingTable:
    # Imported here: torch takes seconds, and wrong options or missing data should be told at once.
    from tqdm import tqdm

    from mtmoe.checkpoint import locate_model
    from mtmoe.commands.evaluate import fingerprint
    from mtmoe.evaluation.test_sets import PreparedData

    if (args.data is None) == (args.text is None):
        raise ConfigError("a MODEL needs DATA, once: the prepared data whose text it shall read")
    folder = args.data or args.text
    if args.limit < 0:
        raise ValueError(f"limit={args.limit} must be 0 (all segments) or more")
    data, found = PreparedData(folder), locate_model(args.model)
    wanted = None
    if args.directions != "all":
        wanted = ["-".join(parse_direction(one.strip())) for one in args.directions.split(",") if one.strip()]
    directions = data.choose_directions(wanted, args.split)

    from mtmoe.inference import Translator
    from mtmoe.inference.routing import collect_routing

    translator = Translator.load(found, data=folder, device=args.device, dtype=args.dtype, threads=args.threads)
    test_sets = (data.read(direction, args.split, args.limit) for direction in directions)
    with tqdm(unit="segment", desc="reading", file=sys.stderr, disable=None) as bar:
        return collect_routing(
            translator,
            ((one.direction, one.sources, one.references) for one in test_sets),
            directions,
            by_language=args.by == "language",
            model=fingerprint(found),
            max_tokens=args.max_tokens,
            progress=bar.update,
        )


def _show(table: RoutingTable) -> None:
    from mtmoe.evaluation.report import markdown_table
    from mtmoe.evaluation.routing import (
        between_languages,
        cosine_similarity,
        language_routing,
        own_experts,
        routing_entropy,
    )

    headings = ("entropy, bits", "of", "experts for 80 %", "busiest, x even", "similarity of languages",
                "to the shared network")  # fmt: skip
    rows = []
    for layer in language_routing(table):
        shared = "–" if layer.shared is None else f"{100 * layer.shared.mean():.1f} %"
        rows.append(
            [
                layer.name,
                f"{routing_entropy(layer.top1).mean():.2f}",
                str(layer.top1.shape[1]),
                f"{own_experts(layer.top1).sum(axis=1).mean():.1f}",
                f"{layer.load.max(axis=1).mean() * layer.load.shape[1]:.1f}",
                f"{between_languages(cosine_similarity(layer.top1)):.2f}",
                shared,
            ]
        )
    columns = [("layer", "left"), *((heading, "right") for heading in headings)]
    print(markdown_table((columns, rows)))
    print("\nMeans over languages: of the source in the encoder, of the target in the decoder.")
