"""Measure what pruning costs a model: chrF++ against the share of experts removed, beside random removal.

Works on any model with MoE layers and its prepared data. A stopped run goes on where it was; more metrics, shares or
directions may be added later. Writes OUT/results.json, OUT/pruning.md, OUT/pruning.png and OUT/outputs/.

Examples:
  python scripts/experiments/pruning.py model data --output runs/pruning --dry-run
  python scripts/experiments/pruning.py model data --output runs/pruning --directions en-de,de-en,en-ro,ro-en
  python scripts/experiments/pruning.py model data --output runs/pruning --metrics importance --methods drop,merge
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mtmoe.checkpoint import locate_model, open_model
from mtmoe.checkpoint.expert_scores import METRICS
from mtmoe.commands.evaluate import fingerprint
from mtmoe.commands.prune import parse_balance
from mtmoe.errors import MtmoeError
from mtmoe.evaluation.test_sets import PreparedData, read_json
from mtmoe.experiments.pruning_curves import CurveSettings, Point, PruningCurves
from mtmoe.experiments.pruning_footprint import measure_footprint
from mtmoe.experiments.pruning_report import markdown_report, plot_losses
from mtmoe.files import replacing, write_json, write_text
from mtmoe.inference import Translator
from mtmoe.inference.routing import collect_routing
from mtmoe.routing_table import RoutingTable


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="model folder, checkpoint or run")
    parser.add_argument("data", type=Path, help="prepared data")
    parser.add_argument("--output", type=Path, required=True, metavar="OUT", help="folder of the results")
    parser.add_argument("--routing", type=Path, metavar="FILE", help="of mtmoe routing; default: counted on valid text")
    parser.add_argument("--directions", default="all", metavar="A-B,…", help="default: all that have text")
    parser.add_argument("--removed", default="25,50,60,70,80,90", metavar="P,…", help="percent of the experts that go")
    parser.add_argument("--metrics", default="importance,top1,load-balance,confidence", metavar="A,…",
                        help=f"of: {', '.join(METRICS)}")  # fmt: skip
    parser.add_argument("--scopes", default="language,pair,set,global", metavar="A,…", help="as of mtmoe prune")
    parser.add_argument("--rules", default="layer", metavar="A,…", help="layer, threshold")
    parser.add_argument("--methods", default="drop", metavar="A,…", help="drop, merge")
    parser.add_argument("--seeds", default="1,2,3", metavar="N,…", help="of random removal")
    parser.add_argument("--balance", metavar="E:D", help="parts of encoder and decoder in what stays, as 3:1")
    parser.add_argument("--split", choices=("valid", "test"), default="valid", help="text to score")
    parser.add_argument("--limit", type=int, default=200, metavar="N", help="segments of each direction; 0 takes all")
    parser.add_argument("--beam", type=int, default=4, metavar="N", help="hypotheses kept")
    parser.add_argument("--max-tokens", type=int, default=2048, metavar="N", help="source tokens of a batch")
    parser.add_argument("--samples", type=int, default=2000, metavar="N", help="resamples of the significance test")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="loadings to measure; 0 measures none")
    parser.add_argument("--dry-run", action="store_true", help="print what would be translated, and stop")
    args = parser.parse_args(arguments)
    try:
        return _run(args)
    except (MtmoeError, ValueError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2


def _run(args: argparse.Namespace) -> int:
    data, found = PreparedData(args.data), locate_model(args.model)
    model, made_by = open_model(found, args.data), fingerprint(found)
    directions = data.choose_directions(None if args.directions == "all" else _words(args.directions), args.split)
    settings = CurveSettings(
        directions=tuple(directions),
        removed=tuple(float(share) for share in _words(args.removed)),
        metrics=tuple(_words(args.metrics)),
        scopes=tuple(_words(args.scopes)),
        rules=tuple(_words(args.rules)),
        methods=tuple(_words(args.methods)),
        seeds=tuple(int(seed) for seed in _words(args.seeds)),
        balance=None if args.balance is None else parse_balance(args.balance),
        beam=args.beam,
        max_tokens=args.max_tokens,
        samples=args.samples,
    )
    table = _routing(args, data, Translator.from_stored(model), made_by)
    test_sets = {direction: data.read(direction, args.split, args.limit) for direction in directions}
    curves = PruningCurves(model, made_by, table, test_sets, settings, args.output)
    for share in sorted(set(settings.removed) - set(curves.shares())):
        _tell(f"{share:g} % cannot go: layers would be left with fewer experts than their top_k")
    if args.dry_run:
        _plan(curves)
        return 0
    curves.run(_tell)
    results = curves.results() | {"split": args.split, "limit": args.limit}
    if args.repeats:
        results["footprints"] = _footprints(curves, args.repeats)
    write_json(args.output / "results.json", results)
    write_text(args.output / "pruning.md", markdown_report(results))
    with replacing(args.output / "pruning.png") as temporary:
        temporary.write_bytes(plot_losses(results).png())
    print(markdown_report(results))
    return 0


def _routing(args: argparse.Namespace, data: PreparedData, translator: Translator, made_by: str) -> RoutingTable:
    """The routing of the model over all valid text; kept beside the results."""
    path = args.routing or args.output / "routing.json"
    if path.is_file():
        table = RoutingTable.load(path)
        if table.model == made_by:
            return table
        if args.routing is not None:
            raise MtmoeError(f"{path} was counted on another model than {args.model}")
    _tell("counting the routing of valid text")
    directions = data.choose_directions(None, "valid")
    sets = (data.read(direction, "valid") for direction in directions)
    texts = ((one.direction, one.sources, one.references) for one in sets)
    table = collect_routing(translator, texts, directions, model=made_by)
    table.save(args.output / "routing.json")
    return table


def _plan(curves: PruningCurves) -> None:
    jobs = curves.jobs()
    segments = {direction: len(one.sources) for direction, one in curves.test_sets.items()}
    for curve in curves.settings.curves():
        print(f"{curve.name}: {', '.join(f'{share:g} %' for share in curves.shares())}")
    left = [
        (name, direction)
        for name, job in jobs.items()
        for direction in job.directions
        if curves.store(name).load(curves.test_sets[direction]) is None
    ]
    translations = sum(len(job.directions) for job in jobs.values())
    print(
        f"{len(curves.settings.directions)} directions, {len(list(curves.points()))} points, {len(jobs)} different "
        f"sets of experts; {len(left)} of {translations} translations are left: "
        f"{sum(segments[direction] for _, direction in left):,} segments"
    )


def _footprints(curves: PruningCurves, repeats: int) -> list[dict[str, float]]:
    """Size, memory and loading by share, of the first curve and direction."""
    curve, direction = curves.settings.curves()[0], curves.settings.directions[0]
    path, known = curves.folder / "footprints.json", {}
    if path.is_file():
        kept = read_json(path, "footprints of an earlier run")
        known = kept["shares"] if kept.get("model") == curves.fingerprint else {}
    found = []
    for share in (0.0, *curves.shares()):
        name = f"{share:g}"
        if name not in known:
            _, job = curves.job_of(Point(curve, share, 0, direction))
            known[name] = measure_footprint(job.pruner.build(job.selection), repeats)
            write_json(path, {"model": curves.fingerprint, "shares": known})
            _tell(f"measured the loading of a model with {name} % removed")
        found.append({"removed": share, **known[name]})
    return found


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
