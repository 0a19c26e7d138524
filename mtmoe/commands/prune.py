"""Remove experts from a model: those that some languages, or all of them, need least.

Which experts the tokens choose is counted over the validation text of prepared DATA, or read from the file that `mtmoe
routing` wrote. Say how many experts stay: --keep (a share or a number), --max-size (as many as fit), or --max-loss (the
fewest with which chrF++ on validation text falls by no more, in the mean over directions).

Examples:
  mtmoe prune model data --keep 20% --languages de,ro -o model-de-ro
  mtmoe prune model routing.json --max-size 500MB --dry-run
  mtmoe prune model data --max-loss 0.3 --directions en-de -o model-en-de
  mtmoe prune model data --keep encoder=30%,decoder=10% --method merge --recover 300 -o small
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtmoe.errors import ConfigError, DataError
from mtmoe.files import write_json
from mtmoe.languages import canonical, parse_direction

if TYPE_CHECKING:
    from mtmoe.checkpoint import StoredModel
    from mtmoe.checkpoint.expert_scores import LayerKey, Scope, Scores
    from mtmoe.checkpoint.expert_selection import Budget, ExpertSelection
    from mtmoe.evaluation.test_sets import PreparedData, TestSet
    from mtmoe.experiments.pruning import Pruner, PruningOptions
    from mtmoe.routing_table import RoutingTable

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
"""Bytes of a unit of --max-size, its B taken off."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.add_argument("model", type=Path, metavar="MODEL", help="model folder, checkpoint (.pt) or folder of a run")
    parser.add_argument(
        "source", type=Path, metavar="DATA-or-ROUTING.json", help="prepared data, or a file of `mtmoe routing`"
    )
    parser.add_argument("-o", "--output", type=Path, metavar="FOLDER", help="model folder to write or replace")
    amount = parser.add_argument_group("how much stays (one of them)").add_mutually_exclusive_group(required=True)
    amount.add_argument(
        "--keep", metavar="N|P%", help="experts over all layers, as 64 or 20%%; or encoder=30%%,decoder=10%%"
    )
    amount.add_argument("--max-size", metavar="SIZE", help="as many experts as fit into a folder of 500MB, 1.5GiB")
    amount.add_argument(
        "--max-loss", type=float, metavar="X", help="the fewest experts that lose at most so much chrF++, in the mean"
    )
    languages = parser.add_argument_group("whom it is for (default: all directions)")
    languages.add_argument("--languages", metavar="A,B", help="both ways between all of these, as de,ro")
    languages.add_argument("--directions", metavar="A-B,…", help="only these directions, as en-de,en-ro")
    languages.add_argument(
        "--scope",
        choices=("language", "pair", "set", "global"),
        help="whose tokens count: of the source languages in the encoder and the target languages in the decoder, over "
        "all partners (language); of the named directions only (pair); of all directions among the languages (set); "
        "of all (global); default: language, or global where none is named",
    )
    _add_choice_arguments(parser)
    _add_run_arguments(parser)


def _add_choice_arguments(parser: argparse.ArgumentParser) -> None:
    choice = parser.add_argument_group("which experts stay")
    choice.add_argument(
        "--metric",
        default="importance",
        metavar="NAME",
        help="importance (top1 x exp of its confidence), top1, top2, mean, load-balance, importance-plain, "
        "importance-load-balance, confidence, or random",
    )
    choice.add_argument(
        "--selection",
        choices=("layer", "threshold"),
        default="layer",
        help="equally many in each layer, or as many in each as a common threshold of the metric's sum keeps",
    )
    choice.add_argument("--balance", metavar="E:D", help="parts of encoder and decoder in what stays, as 3:1")
    choice.add_argument("--minimum", type=int, default=4, metavar="N", help="experts that a threshold leaves a layer")
    choice.add_argument("--seed", type=int, default=1, metavar="N", help="of --metric random and --recover")
    choice.add_argument(
        "--method",
        choices=("drop", "merge"),
        default="drop",
        help="drop the other experts, or merge each into the most similar one that stays",
    )
    choice.add_argument(
        "--recover", type=int, default=0, metavar="N", help="updates of fine-tuning towards MODEL at last; needs DATA"
    )
    choice.add_argument("--recover-lr", type=float, default=2e-4, metavar="X", help="greatest learning rate of these")


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    work = parser.add_argument_group("work")
    work.add_argument("--dry-run", action="store_true", help="print what would go, and write nothing")
    work.add_argument("--report", type=Path, metavar="FILE", help="JSON of what stays and goes, and of the figures")
    work.add_argument("--data", type=Path, metavar="DATA", help="prepared data, beside a ROUTING.json")
    work.add_argument(
        "--limit", type=int, default=200, metavar="N", help="validation segments of each direction; 0 takes all"
    )
    work.add_argument("--beam", type=int, default=4, metavar="N", help="hypotheses kept in the search of --max-loss")
    work.add_argument("--max-tokens", type=int, default=2048, metavar="N", help="tokens in a batch")
    work.add_argument("--device", default="cpu", metavar="NAME", help="torch device to run on")
    work.add_argument("--threads", type=int, metavar="N", help="CPU threads; default: torch's choice")


def run(args: argparse.Namespace) -> int:
    """Prune; returns the exit status."""
    try:
        return _run(args)
    except ValueError as error:  # an option that is out of range
        raise ConfigError(str(error)) from error


def _run(args: argparse.Namespace) -> int:
    _check(args)
    # Imported here: torch takes seconds, and wrong options should be told at once.
    import torch

    from mtmoe.checkpoint import locate_model, open_model
    from mtmoe.checkpoint.expert_scores import first_choices
    from mtmoe.checkpoint.folder import write_folder
    from mtmoe.experiments.pruning import Pruner

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    found = locate_model(args.model)
    model = open_model(found, args.data or (args.source if args.source.is_dir() else None))
    table = _routing(args, found, model)
    scope = _scope(args, table)
    pruner = Pruner(model, table, scope, _options(args))
    selection, figures = _choose(args, pruner)
    _show(selection, first_choices(table, scope), figures)
    if args.report is not None:
        write_json(args.report, _report(args, selection, figures))
    if args.dry_run:
        print("dry run: nothing was written")
        return 0
    smaller = pruner.build(selection).after("pruned", **_history(args, selection, scope))
    if args.recover:
        smaller = _recover(args, model, smaller, scope).after("recovered", updates=args.recover)
    write_folder(args.output, smaller)
    size = sum(path.stat().st_size for path in args.output.rglob("*") if path.is_file())
    print(f"wrote {args.output}: {size / 1e6:,.1f} MB")
    return 0


def _check(args: argparse.Namespace) -> None:
    if args.output is None and not args.dry_run:
        raise ConfigError("name the folder to write with -o FOLDER, or look first with --dry-run")
    if not args.source.exists():
        raise DataError(f"{args.source} does not exist; give prepared data, or a file that `mtmoe routing` wrote")
    if args.source.is_dir() and args.data is not None:
        raise ConfigError("--data goes with a ROUTING.json; the second argument is prepared data already")
    for option, wanted in (("--max-loss", args.max_loss is not None), ("--recover", args.recover > 0)):
        if wanted and args.source.is_file() and args.data is None:
            raise ConfigError(f"{option} needs text: give --data DATA beside {args.source}")
    for option, value in (("--limit", args.limit), ("--recover", args.recover)):
        if value < 0:
            raise ConfigError(f"{option} {value} must be 0 or more")
    if args.max_loss is not None and args.max_loss < 0:
        raise ConfigError(f"--max-loss {args.max_loss} must be 0 or more, in points of chrF++")
    if args.languages and args.directions:
        raise ConfigError("give either --languages or --directions")


def _options(args: argparse.Namespace) -> PruningOptions:
    from mtmoe.experiments.pruning import PruningOptions

    return PruningOptions(
        metric=args.metric,
        rule=args.selection,
        balance=None if args.balance is None else parse_balance(args.balance),
        minimum=args.minimum,
        method=args.method,
        seed=args.seed,
    )


def _routing(args: argparse.Namespace, found: Path, model: StoredModel) -> RoutingTable:
    from mtmoe.commands.evaluate import fingerprint
    from mtmoe.routing_table import RoutingTable

    made_by = fingerprint(found)
    if args.source.is_file():
        table = RoutingTable.load(args.source)
        if table.model not in (None, made_by):
            raise DataError(
                f"{args.source} was counted on another model than {found}, whose experts it does not tell apart; count "
                f"again with `mtmoe routing {found} DATA --output {args.source}`, or give DATA itself"
            )
        return table
    from tqdm import tqdm

    from mtmoe.inference import Translator
    from mtmoe.inference.routing import collect_routing

    data = _open_data(args)
    directions = data.choose_directions(None, "valid")
    texts = (data.read(direction, "valid", args.limit) for direction in directions)
    with tqdm(unit="segment", desc="reading", file=sys.stderr, disable=None) as bar:
        return collect_routing(
            Translator.from_stored(model, device=args.device),
            ((one.direction, one.sources, one.references) for one in texts),
            directions,
            model=made_by,
            max_tokens=args.max_tokens,
            progress=bar.update,
        )


def _scope(args: argparse.Namespace, table: RoutingTable) -> Scope:
    from mtmoe.checkpoint.expert_scores import Scope

    languages = [canonical(one) for one in _words(args.languages)]
    directions = ["-".join(parse_direction(one)) for one in _words(args.directions)]
    kind = args.scope or ("language" if languages or directions else "global")
    return Scope.of(
        table, kind, languages=list(dict.fromkeys(languages)), directions=list(dict.fromkeys(directions))
    )


def _words(text: str | None) -> list[str]:
    return [word.strip() for word in (text or "").split(",") if word.strip()]


def _open_data(args: argparse.Namespace) -> PreparedData:
    from mtmoe.evaluation.test_sets import PreparedData

    return PreparedData(args.data or args.source)


def _choose(args: argparse.Namespace, pruner: Pruner) -> tuple[ExpertSelection, dict[str, Any]]:
    """The experts that stay, and the figures that go with them."""
    from mtmoe.checkpoint.pruning import bytes_of_experts, bytes_of_model
    from mtmoe.checkpoint.pruning_search import bytes_removed, most_within

    full, of_expert = bytes_of_model(pruner.model), bytes_of_experts(pruner.model)
    figures: dict[str, Any] = {"bytes_before": full}
    if args.max_size is not None:
        size = parse_size(args.max_size)
        selection = pruner.choose(most_within(size, full, of_expert, pruner.fewest, pruner.total, pruner.choose))
    elif args.max_loss is not None:
        selection, more = _search(args, pruner)
        figures |= more
    else:
        selection = pruner.choose(parse_keep(args.keep, pruner.experts))
    return selection, figures | {"bytes_after": full - bytes_removed(selection, of_expert)}


def _search(args: argparse.Namespace, pruner: Pruner) -> tuple[ExpertSelection, dict[str, Any]]:
    """The fewest experts that hold --max-loss on validation text; every try is told of on standard error."""
    from mtmoe.checkpoint.pruning_search import smallest_that_holds
    from mtmoe.experiments.pruning import Loss, chrf_of, translate_sets

    sets = _validation_sets(args, pruner.scope)
    options = {"beam": args.beam, "max_tokens": args.max_tokens, "device": args.device}

    def score(model: StoredModel) -> dict[str, float]:
        return chrf_of(translate_sets(model, sets, **options), sets)

    before = score(pruner.model)
    mean = sum(before.values()) / len(before)
    segments = sum(len(one.sources) for one in sets)
    _tell(f"all {pruner.total} experts: chrF++ {mean:.2f} over {len(sets)} directions, {segments} segments")
    tried: dict[int, Loss] = {}

    def holds(count: int) -> bool:
        loss = tried[count] = Loss.between(before, score(pruner.build(pruner.choose(count))))
        enough = bool(loss.mean <= args.max_loss)
        _tell(
            f"{count} experts: chrF++ {mean - loss.mean:.2f}, lost {loss.mean:.2f} in the mean and {loss.worst[1]:.2f} "
            f"in {loss.worst[0]}: {'holds' if enough else 'too much'}"
        )
        return enough

    count = smallest_that_holds(pruner.fewest, pruner.total, holds)
    loss = tried.get(count, Loss.between(before, before))
    return pruner.choose(count), {"chrf++_before": dict(before), "chrf++_lost": dict(loss.by_direction)}


def _validation_sets(args: argparse.Namespace, scope: Scope) -> list[TestSet]:
    data = _open_data(args)
    wanted = [direction for direction in scope.directions if data.has_text(direction, "valid")]
    if not wanted:
        raise DataError(
            f"{data.folder} has no valid text between {', '.join(scope.sources)} and {', '.join(scope.targets)}, so no "
            "loss can be measured; use --keep or --max-size"
        )
    return [data.read(direction, "valid", args.limit) for direction in wanted]


def _recover(args: argparse.Namespace, parent: StoredModel, smaller: StoredModel, scope: Scope) -> StoredModel:
    from tqdm import tqdm

    from mtmoe.experiments.recovery import recover_stored
    from mtmoe.training.recovery import RecoveryOptions

    options = RecoveryOptions(updates=args.recover, learning_rate=args.recover_lr)
    with tqdm(total=args.recover, unit="update", desc="recovering", file=sys.stderr, disable=None) as bar:

        def progress(done: int, loss: float) -> None:
            bar.set_postfix_str(f"loss {loss:.2f}", refresh=False)
            bar.update()

        return recover_stored(
            smaller,
            parent,
            args.data or args.source,
            scope.directions or smaller.languages.directions,
            options,
            max_tokens=args.max_tokens,
            seed=args.seed,
            device=args.device,
            progress=progress,
        )


def parse_keep(text: str, experts: Mapping[LayerKey, int]) -> Budget:
    """Read ``20%``, ``64`` or ``encoder=30%,decoder=10%``.

    Args:
        text: of --keep.
        experts: MoE layer -> its experts, which shares are of.

    Raises:
        ValueError: it is nothing of the kind.
    """
    total = sum(experts.values())
    if "=" not in text:
        return _count(text, total)
    budget: dict[str, int] = {}
    for part in _words(text):
        side, _, amount = part.partition("=")
        if side not in ("encoder", "decoder") or side in budget:
            raise ValueError(f"--keep {text}: name the encoder and the decoder once each, as encoder=30%,decoder=10%")
        budget[side] = _count(amount, sum(count for (of, _), count in experts.items() if of == side))
    return budget


def _count(text: str, total: int) -> int:
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", text.strip()):
        share = float(match[1])
        if not 0 < share <= 100:
            raise ValueError(f"--keep {text} must be above 0 % and at most 100 %")
        return round(total * share / 100)
    if not text.strip().isdecimal():
        raise ValueError(f"--keep {text} must be a share, as 20%, or a number of experts, as 64")
    return int(text)


def parse_size(text: str) -> int:
    """Read ``500MB``, ``1.5 GiB`` or a number of bytes.

    Raises:
        ValueError: it is no size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]i?)?b?", text.strip().lower())
    if not match:
        raise ValueError(f"--max-size {text} must be a size, as 500MB, 1.5GiB or a number of bytes")
    return int(float(match[1]) * UNITS[match[2] or ""])


def parse_balance(text: str) -> tuple[int, int]:
    """Read ``3:1``, parts of the encoder and of the decoder.

    Raises:
        ValueError: it is no ratio.
    """
    match = re.fullmatch(r"(\d+):(\d+)", text.strip())
    if not match:
        raise ValueError(f"--balance {text} must be two whole numbers, parts of encoder and decoder, as 3:1")
    return int(match[1]), int(match[2])


def _show(selection: ExpertSelection, shares: Scores, figures: Mapping[str, Any]) -> None:
    from mtmoe.evaluation.report import markdown_table

    columns = [("layer", "left"), ("experts", "right"), ("stay", "right"), ("first choices kept", "right"),
               ("go", "left")]  # fmt: skip
    kept = selection.share_kept(shares)
    rows = [
        [
            " ".join(map(str, layer)),
            str(selection.num_experts[layer]),
            str(len(selection.kept[layer])),
            f"{100 * kept[layer]:.1f} %",
            ranges(selection.removed(layer)) or "–",
        ]
        for layer in selection.kept
    ]
    print(markdown_table((columns, rows)))
    total = sum(selection.num_experts.values())
    print(
        f"\n{selection.total} of {total} experts stay ({100 * selection.total / total:.1f} %); "
        f"{figures['bytes_before'] / 1e6:,.1f} MB become {figures['bytes_after'] / 1e6:,.1f} MB"
    )
    if "chrf++_lost" in figures:
        lost = figures["chrf++_lost"]
        worst = max(lost, key=lost.__getitem__)
        print(
            f"chrF++ on validation text falls by {sum(lost.values()) / len(lost):.2f} in the mean, "
            f"by {lost[worst]:.2f} at most ({worst})"
        )


def ranges(numbers: tuple[int, ...]) -> str:
    """Rising numbers with runs as ranges: ``0-2, 5``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ", ".join("-".join(map(str, run)) for run in runs)


def _history(args: argparse.Namespace, selection: ExpertSelection, scope: Scope) -> dict[str, Any]:
    """What a model folder says about how it was pruned."""
    chosen = {name: getattr(args, name) for name in ("metric", "selection", "method")}
    whom = {} if scope.kind == "global" else {"sources": list(scope.sources), "targets": list(scope.targets)}
    kept = {"kept": selection.total, "of": sum(selection.num_experts.values())}
    return kept | chosen | {"scope": scope.kind} | whom


def _report(args: argparse.Namespace, selection: ExpertSelection, figures: Mapping[str, Any]) -> dict[str, Any]:
    layers = [
        {"side": side, "layer": number, "num_experts": selection.num_experts[side, number], "kept": list(kept)}
        for (side, number), kept in selection.kept.items()
    ]
    chosen = {name: getattr(args, name) for name in ("metric", "selection", "method", "recover", "seed")}
    return {"model": str(args.model), **chosen, "layers": layers, **figures}


def _tell(line: str) -> None:
    print(f"mtmoe prune: {line}", file=sys.stderr, flush=True)
