"""Train and evaluate all configurations of an experiment, so many at a time; go on where it was stopped.

A run is done when its file stands in the results folder. A stopped one goes on from its last checkpoint. Test text is
translated when a run ends and scored once, with --test, when all runs are done.

Examples:
  python scripts/experiments/low_resource.py --dry-run                  # the plan and its time
  python scripts/experiments/low_resource.py                            # all of it
  python scripts/experiments/low_resource.py --only moe_eom --seeds 1   # one row
  python scripts/experiments/low_resource.py --test                     # score the test outputs of all runs
  python scripts/experiments/low_resource.py --experiment scripts/experiments/bible.yaml
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from mtmoe.errors import MtmoeError
from mtmoe.experiments.plan import Experiment, Run, load_experiment
from mtmoe.experiments.run import RunFailed, execute, score_test
from mtmoe.experiments.schedule import Pool, plan_lines

DEFAULT = Path(__file__).resolve().with_suffix(".yaml")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", type=Path, default=DEFAULT, metavar="FILE", help="default: low_resource.yaml")
    parser.add_argument("--only", default="", metavar="A,B", help="only these configurations")
    parser.add_argument("--seeds", default="", metavar="1,2", help="only these seeds")
    parser.add_argument("--jobs", type=int, metavar="N", help="runs at a time; default: as the experiment says")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and its time, and stop")
    parser.add_argument("--test", action="store_true", help="score the test outputs of finished runs, and stop")
    args = parser.parse_args(arguments)
    try:
        return _run(args)
    except RunFailed as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return error.status
    except MtmoeError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2


def _run(args: argparse.Namespace) -> int:
    experiment = load_experiment(args.experiment)
    only = [name.strip() for name in args.only.split(",") if name.strip()]
    runs = experiment.runs(only, [int(seed) for seed in args.seeds.split(",") if seed.strip()])
    jobs = args.jobs or experiment.jobs
    if args.dry_run:
        print("\n".join(plan_lines(experiment, runs, jobs)))
        return 0
    if args.test:
        for run in runs:
            score_test(run)
            print(f"{run.name}: test scored")
        return 0
    if not (experiment.data / "languages.json").is_file():
        _prepare(experiment)
    if jobs == 1 or len(runs) == 1:
        for run in runs:
            execute(run, report=lambda line: print(line, flush=True))
        return 0
    return _work(args.experiment, experiment, runs, jobs)


def _prepare(experiment: Experiment) -> None:
    from mtmoe.cli import main as mtmoe

    status = mtmoe(["prepare", experiment.recipe, "--output", str(experiment.data)])
    if status:
        raise RunFailed(f"{experiment.recipe} could not be prepared", status)


def _work(file: Path, experiment: Experiment, runs: Sequence[Run], jobs: int) -> int:
    def command(run: Run) -> list[str]:
        words = ["--experiment", str(file), "--only", run.configuration.name, "--seeds", str(run.seed), "--jobs", "1"]
        return [sys.executable, os.fspath(Path(__file__).resolve()), *words]

    failed = Pool(command, jobs, report=lambda line: print(line, flush=True)).work(runs)
    print(plan_lines(experiment, runs, jobs)[-1])
    for name, status in failed.items():
        print(f"{name}: not done (status {status})")
    return max(failed.values(), default=0)


if __name__ == "__main__":
    sys.exit(main())
