"""Start fairseq-train from a preset: the command, its environment, its log, and a time budget."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mtmoe.errors import ConfigError, DataError, MtmoeError
from mtmoe.files import write_json, write_text

logger = logging.getLogger(__name__)

TCMALLOC = ("libtcmalloc_minimal.so.4", "libtcmalloc.so.4")
LIBRARY_FOLDERS = tuple(f"/usr/{name}" for name in ("lib/x86_64-linux-gnu", "lib/aarch64-linux-gnu", "lib64", "lib"))
MALLOC_SETTINGS = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 32),
    "MALLOC_TOP_PAD_": str(1 << 26),
}
"""Keeps glibc from giving memory back between updates: 1.06 x in training where tcmalloc gives 1.4 x."""

ONEDNN_KERNELS = "4096"
"""Compiled CPU kernels that oneDNN keeps. It compiles one for each shape of a bf16 product (0.35 ms); batches come in some
hundred shapes with a dozen products each, more than its default of 1,024. Each kernel takes some 0.1 MB of memory."""

CALIBRATION_SECONDS = 40.0
"""Of real training, after the warm-up, to find the rate of updates."""

WARM_UPDATES = 20
"""Updates of the short training that do not count."""

RESERVE = 0.04
"""Share of the budget that is kept for the last validation and checkpoint, and for a rate that drops."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """A preset: what `mtmoe train` reads from YAML, and saves in ``run.json``."""

    data: str
    """Folder that `mtmoe prepare` wrote."""
    output: str
    """Run folder; checkpoints, logs and the command go there."""
    arch: str = "mtmoe_transformer_tiny"
    """fairseq architecture."""
    task: str = "mtmoe_translation"
    """fairseq task."""
    criterion: str = "mtmoe_label_smoothed_cross_entropy"
    """fairseq criterion."""
    optimizer: str = "mtmoe_adamw"
    """fairseq optimiser."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Any other option of fairseq-train, without dashes: ``max-tokens: 1024``, ``cpu: true``; false leaves it out."""
    curriculum: Sequence[Mapping[str, Any]] | None = None
    """Phases, as in a curriculum file; written to the run folder."""
    minutes: float = 0.0
    """Time budget of training; max-update then follows from a short calibration. 0 = as options say."""
    threads: int = 0
    """OMP_NUM_THREADS of training; 0 = one a core that this process may use."""
    allocator: str = "auto"
    """"auto": tcmalloc where it is installed, else glibc with settings for training; "system": leave it alone."""

    def __post_init__(self) -> None:
        if self.minutes < 0:
            raise ConfigError(f"minutes={self.minutes} must not be negative; 0 = no budget")
        if self.allocator not in ("auto", "system"):
            raise ConfigError(f"allocator={self.allocator!r} is unknown; choose one of: auto, system")
        fields = {"save-dir", "user-dir", "arch", "task", "criterion", "optimizer", "curriculum-file"}
        fixed = fields & set(self.options)
        if fixed:
            raise ConfigError(f"options must not set {', '.join(sorted(fixed))}; that is set outside of options")

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.output)


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a preset, and change some of it.

    Args:
        path: YAML file with the fields of `TrainConfig`.
        overrides: ``key=value``; a key that is no field of the config is an option of fairseq-train, with or without
            ``options.`` before it. Values are YAML.

    Raises:
        ConfigError: the file cannot be read, a key is unknown, or a value makes no sense.
    """
    try:
        document = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(document, dict):
        raise ConfigError(f"{path} must hold keys and values, such as data: runs/demo/data")
    document["options"] = {str(key).replace("_", "-"): value for key, value in (document.get("options") or {}).items()}
    known = set(TrainConfig.__dataclass_fields__)
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator:
            raise ConfigError(f"--set {override!r} must be key=value, such as max-tokens=2048")
        value = yaml.safe_load(text)
        if key in known and key != "options":
            document[key] = value
        else:
            document["options"][key.removeprefix("options.").replace("_", "-")] = value
    unknown = sorted(set(document) - known)
    if unknown:
        raise ConfigError(
            f"{path}: unknown key {', '.join(map(str, unknown))}; choose from: {', '.join(sorted(known))}. "
            "Options of fairseq-train go under options:"
        )
    missing = [key for key in ("data", "output") if not document.get(key)]
    if missing:
        raise ConfigError(f"{path}: {' and '.join(missing)} must be given")
    return TrainConfig(**document)


def plugin_folder() -> Path:
    """The folder of the fairseq plugins, for ``--user-dir``.

    Raises:
        ConfigError: they are not installed.
    """
    found = importlib.util.find_spec("fairseq_plugins")  # finds without importing: that would load fairseq
    if found is None or not found.submodule_search_locations:
        raise ConfigError("the fairseq plugins are not installed; install the package with pip, or run in its checkout")
    return Path(next(iter(found.submodule_search_locations))).resolve()


def build_command(config: TrainConfig, *, save_dir: Path | None = None, **changes: Any) -> list[str]:
    """The fairseq-train command of a preset, word by word.

    Args:
        config: the preset.
        save_dir: where checkpoints go; by default ``checkpoints`` in the run folder.
        changes: options that come before those of the preset, with underscores; None leaves one out.

    Raises:
        ConfigError: fairseq-train is not installed.
    """
    options: dict[str, Any] = {
        "user-dir": plugin_folder(),
        "save-dir": save_dir or config.folder / "checkpoints",
        "arch": config.arch,
        "task": config.task,
        "criterion": config.criterion,
        "optimizer": config.optimizer,
        "log-format": "json",
        "num-workers": 0,
        **config.options,
        **{key.replace("_", "-"): value for key, value in changes.items()},
    }
    if config.curriculum is not None:
        options["curriculum-file"] = config.folder / "curriculum.yaml"
    if options.get("lr-scheduler") == "polynomial_decay":
        options.setdefault("total-num-update", options.get("max-update"))
    words = [str(_program("fairseq-train")), config.data]
    for key, value in options.items():
        if value is None or value is False:
            continue
        words.append(f"--{key}")
        if value is not True:
            words.append(",".join(map(str, value)) if isinstance(value, list | tuple) else str(value))
    return words


def build_environment(config: TrainConfig, report: Callable[[str], None] = logger.info) -> dict[str, str]:
    """The variables that the training process runs under; says on `report` which allocator it gets."""
    environment = dict(os.environ)
    threads = config.threads or len(os.sched_getaffinity(0))
    environment["OMP_NUM_THREADS"] = str(threads)
    environment.setdefault("PYTHONUNBUFFERED", "1")
    environment.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", ONEDNN_KERNELS)
    if config.allocator == "auto":
        library = find_tcmalloc()
        if library is not None:
            already = environment.get("LD_PRELOAD", "")
            if "tcmalloc" not in already:
                environment["LD_PRELOAD"] = f"{library}:{already}".rstrip(":")
            report(f"memory allocator: tcmalloc ({library})")
        else:
            for name, value in MALLOC_SETTINGS.items():
                environment.setdefault(name, value)
            report(
                "memory allocator: glibc; training on CPUs is about 1.3 x faster with tcmalloc "
                "(Debian and Ubuntu: apt install libtcmalloc-minimal4)"
            )
    return environment


def find_tcmalloc(folders: Sequence[str] = LIBRARY_FOLDERS) -> Path | None:
    """The tcmalloc library, if it is installed."""
    candidates = (Path(folder) / name for name in TCMALLOC for folder in folders)
    return next((path for path in candidates if path.is_file()), None)


def train(config: TrainConfig, *, resume: bool = True, report: Callable[[str], None] = print) -> int:
    """Run a preset to its end, or go on with it.

    Writes in the run folder: ``checkpoints/``, ``log.jsonl`` (a JSON object for each line of metrics), ``train.log``
    (all that fairseq prints), ``command.txt``, ``run.json`` and, with a time budget, ``calibration.json``.

    Args:
        config: the preset.
        resume: go on from ``checkpoint_last.pt`` where there is one; else refuse a folder that has checkpoints.
        report: gets a line of progress at a time.

    Returns:
        The exit status of fairseq-train; 0 = done, 143 and 130 = stopped by a signal, with a checkpoint.

    Raises:
        ConfigError, DataError: the preset cannot be run.
    """
    if not (Path(config.data) / "languages.json").is_file():
        raise DataError(f"{config.data} is no prepared data: languages.json is missing; run `mtmoe prepare` first")
    last = config.folder / "checkpoints" / "checkpoint_last.pt"
    if last.exists() and not resume:
        raise ConfigError(f"{last} exists; go on with --resume auto, or give another output folder")
    config.folder.mkdir(parents=True, exist_ok=True)
    if config.curriculum is not None:
        phases = [dict(phase) for phase in config.curriculum]
        write_text(config.folder / "curriculum.yaml", yaml.safe_dump(phases, sort_keys=False))
    environment = build_environment(config, report)
    changes: dict[str, Any] = {}
    if config.minutes:
        changes = time_budget(config, environment, report)
    command = build_command(config, **changes)
    write_text(config.folder / "command.txt", shlex.join(command) + "\n")
    write_json(config.folder / "run.json", describe_run(config, command, environment))
    report(shlex.join(command))
    if last.exists():
        report(f"resuming from {last}")
    log = RunLog(config.folder, report)
    with log:
        status = run_process(command, environment, log.line)
    if status == 0:
        report(f"training is done: {config.folder / 'checkpoints'}")
    elif status in (128 + signal.SIGTERM, 128 + signal.SIGINT):
        report("training was stopped; the same command goes on with it")
    else:
        report(f"fairseq-train ended with status {status}; the end of {config.folder / 'train.log'} says why:")
        for line in log.tail:
            report(f"  {line}")
    return status


def time_budget(
    config: TrainConfig, environment: Mapping[str, str], report: Callable[[str], None] = print
) -> dict[str, Any]:
    """Options that make training fit into ``config.minutes``: the number of updates, and a hard limit behind it.

    The rate is measured once, in a short training of the same model and data in a temporary folder, and kept in
    ``calibration.json``: a resumed run has the same schedule as an unbroken one.

    Raises:
        MtmoeError: the short training failed.
    """
    config.folder.mkdir(parents=True, exist_ok=True)
    path = config.folder / "calibration.json"
    wanted = {"minutes": config.minutes, "options": json.loads(json.dumps(dict(config.options))), "arch": config.arch}
    if path.is_file():
        stored = json.loads(path.read_text(encoding="utf-8"))
        if {key: stored.get(key) for key in wanted} == wanted:
            report(f"time budget: {stored['max_update']} updates in {config.minutes:g} minutes, as measured before")
            return _budget_options(config, stored["max_update"])
        if (config.folder / "checkpoints" / "checkpoint_last.pt").exists():
            raise ConfigError(f"{path} is of other minutes or options; the schedule of a begun run cannot change")
    report(f"time budget: training for {CALIBRATION_SECONDS:.0f} seconds to measure the rate of updates")
    measured = calibrate(config, environment)
    seconds = config.minutes * 60 * (1 - RESERVE) - measured["start_seconds"] - measured["end_seconds"]
    spent = measured["validation_seconds"] * measured["validations_per_update"]
    max_update = max(1, int(seconds / (measured["update_seconds"] + spent)))
    write_json(path, {**wanted, **measured, "max_update": max_update})
    rate = 1 / measured["update_seconds"]
    report(f"time budget: {rate:.2f} updates/s, so {max_update} in {config.minutes:g} minutes")
    return _budget_options(config, max_update)


def _budget_options(config: TrainConfig, max_update: int) -> dict[str, Any]:
    # The limit only acts when the machine gets slower: the schedule then ends before its lr reaches 0.
    return {"max_update": max_update, "total_num_update": max_update, "stop_time_hours": config.minutes / 60}


def calibrate(config: TrainConfig, environment: Mapping[str, str]) -> dict[str, float]:
    """Train for a short while in a temporary folder, and measure.

    Returns:
        ``update_seconds``; ``start_seconds`` before the first update; ``validation_seconds`` of one validation with
        its checkpoint, ``end_seconds`` = the same; ``validations_per_update``, from the options.

    Raises:
        MtmoeError: it failed; the end of its output is in the text.
    """
    validates = not config.options.get("disable-validation")
    with tempfile.TemporaryDirectory(prefix=".calibration-", dir=config.folder) as folder:
        command = build_command(
            config, save_dir=Path(folder), log_interval=10, max_update=1_000_000, total_num_update=1_000_000,
            validate_interval_updates=100 if validates else None, save_interval_updates=None, stop_time_hours=None,
        )  # fmt: skip
        watch = _Calibration()
        status = run_process(command, environment, watch.line)
    if len(watch.steady) < 2:
        tail = "\n  ".join(watch.lines[-15:])
        raise MtmoeError(f"the training to measure the rate of updates ended with status {status}:\n  {tail}")
    (first_time, first), (last_time, last) = watch.steady[0], watch.steady[-1]
    # None came into the window: take a second for each minute of the budget, which is plenty for a valid-limit.
    one = sum(watch.pauses) / len(watch.pauses) if watch.pauses else config.minutes * validates
    intervals = [int(config.options.get(key) or 0) for key in ("validate-interval-updates", "save-interval-updates")]
    rate = max((1 / each for each in intervals if each), default=0.0)
    if watch.epoch_batches:
        freq = int(config.options.get("update-freq") or 1)
        rate += freq / watch.epoch_batches / int(config.options.get("validate-interval") or 1)
    return {
        "update_seconds": max(last_time - first_time - sum(watch.pauses), 1e-6) / (last - first),
        "start_seconds": watch.steady[0][0] - watch.begun - WARM_UPDATES * 0.1,
        "validation_seconds": one if validates else 0.0,
        "end_seconds": one + 1.0,
        "validations_per_update": rate,
    }


class _Calibration:
    """Reads the output of the short training, and says when it has seen enough."""

    def __init__(self) -> None:
        self.begun = time.monotonic()
        self.lines: list[str] = []
        self.steady: list[tuple[float, int]] = []
        """(time, update) of each line of metrics after the warm-up."""
        self.pauses: list[float] = []
        """Seconds of each validation after the warm-up."""
        self.epoch_batches = 0
        self._validating = 0.0

    def line(self, text: str) -> bool:
        """Take a line of output; true once there is nothing more to learn."""
        now = time.monotonic()
        self.lines.append(text)
        batches = re.search(r"\| epoch 1 from update 0: .* (\d+) batches", text)
        if batches:
            self.epoch_batches = int(batches[1])
        if "begin validation on" in text:
            self._validating = now
        record = parse_metrics(text)
        if record is None:
            return False
        if record["kind"] == "train_inner":
            # A warm-up first: allocator, thread pools, the first batches of each length.
            if record["num_updates"] >= WARM_UPDATES:
                self.steady.append((now, int(record["num_updates"])))
        elif record["kind"] != "train" and self._validating and self.steady:
            self.pauses.append(now - self._validating)
            self._validating = 0.0
        return len(self.steady) > 2 and now - self.steady[0][0] > CALIBRATION_SECONDS


def run_process(command: Sequence[str], environment: Mapping[str, str], line: Callable[[str], Any]) -> int:
    """Run a command, give its output to `line`, and pass signals on to it.

    Args:
        command: words.
        environment: its variables.
        line: gets each line of output and errors; a true answer stops the command.

    Returns:
        Its exit status, 128 + the signal's number if a signal ended it.
    """
    process = subprocess.Popen(
        command, env=dict(environment), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        start_new_session=True,  # the terminal's Ctrl-C comes to us alone, and we pass it on once
    )  # fmt: skip
    assert process.stdout is not None
    with _forwarding(process):
        stopped = False
        try:
            for text in process.stdout:
                if line(text.rstrip("\n")) and not stopped:
                    stopped = True
                    os.killpg(process.pid, signal.SIGKILL)
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise
        finally:
            process.stdout.close()
            status = process.wait()
    return 128 - status if status < 0 else status


@contextlib.contextmanager
def _forwarding(process: subprocess.Popen[str]) -> Iterator[None]:
    """Send SIGTERM and SIGINT of this process to `process` while the block runs."""

    def forward(number: int, _: Any) -> None:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(number)

    before = {}
    for number in (signal.SIGTERM, signal.SIGINT):
        with contextlib.suppress(ValueError):  # not the main thread: whoever runs us there has to stop the process
            before[number] = signal.signal(number, forward)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class RunLog:
    """Splits the output of fairseq-train into ``train.log``, ``log.jsonl`` and lines for the screen.

    Args:
        folder: the run folder; both files are added to, so that a resumed run has one history.
        report: gets the lines for the screen.
    """

    def __init__(self, folder: Path, report: Callable[[str], None] = print) -> None:
        self.folder, self.report = folder, report
        self.tail: list[str] = []
        """The last lines, for the case that it fails."""

    def __enter__(self) -> RunLog:
        self._text = (self.folder / "train.log").open("a", encoding="utf-8")
        self._metrics = (self.folder / "log.jsonl").open("a", encoding="utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        self._text.close()
        self._metrics.close()

    def line(self, text: str) -> None:
        """Take a line of output."""
        self._text.write(text + "\n")
        self.tail = [*self.tail[-11:], text]
        record = parse_metrics(text)
        if record is not None:
            self._metrics.write(json.dumps(record) + "\n")
            self._metrics.flush()
            self._text.flush()
            summary = _summary(record)
            if summary:
                self.report(summary)
        elif "WARNING" in text or "ERROR" in text:
            self.report(text.split(" | ", 3)[-1])


def parse_metrics(line: str) -> dict[str, Any] | None:
    """Read the metrics from a line of fairseq's JSON log; None for any other line.

    Returns:
        ``kind`` ("train_inner" at each log interval, "train" at the end of an epoch, "valid" or the name of another
        subset) and the metrics as numbers, without the prefix that fairseq gives them.
    """
    parts = line.split(" | ", 3)
    if len(parts) != 4 or not parts[3].startswith("{"):
        return None
    kind = parts[2].strip()
    try:
        raw = json.loads(parts[3])
    except json.JSONDecodeError:
        return None
    record: dict[str, Any] = {"kind": kind, "time": parts[0].strip()}
    for key, value in raw.items():
        name = key.removeprefix(f"{kind}_")
        record[name] = _number(value)
    return record if "num_updates" in record else None


def _number(value: Any) -> Any:
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            number = float(value)
            # JSON has no NaN and no infinity; as text they stay readable.
            if number != number or number in (float("inf"), float("-inf")):
                return value
            return int(number) if number.is_integer() and "." not in value and "e" not in value else number
    return value


def _summary(record: Mapping[str, Any]) -> str:
    kind = record["kind"]
    if kind == "train_inner":
        rates = f"{record.get('ups', 0):g} updates/s, {record.get('wps', 0):,.0f} words/s"
        return f"update {record['num_updates']:>6}  loss {record['loss']:.3f}  lr {record.get('lr', 0):.2e}  {rates}"
    if kind == "train":
        return ""
    ppl = f"  perplexity {record['ppl']:g}" if "ppl" in record else ""
    best = f"  (best {record['best_loss']:g})" if "best_loss" in record else ""
    return f"update {record['num_updates']:>6}  {kind} loss {record['loss']:.3f}{ppl}{best}"


def describe_run(config: TrainConfig, command: Sequence[str], environment: Mapping[str, str]) -> dict[str, Any]:
    """What is needed to tell how a run was made: config, data, versions, machine."""
    data = Path(config.data) / "data.json"
    fingerprint = json.loads(data.read_text(encoding="utf-8")).get("fingerprint") if data.is_file() else None
    versions = {}
    for package in ("mtmoe", "torch", "ve-fairseq", "numpy", "sentencepiece"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "config": json.loads(json.dumps(asdict(config))),
        "command": list(command),
        "seed": config.options.get("seed", 1),
        "data_fingerprint": fingerprint,
        "dictionary_sha256": hashlib.sha256((Path(config.data) / "dict.txt").read_bytes()).hexdigest(),
        "git_revision": _git_revision(),
        "versions": {"python": platform.python_version(), **versions},
        "machine": {"cpu_count": os.cpu_count(), "platform": platform.platform()},
        "environment": {
            name: environment[name]
            for name in ("OMP_NUM_THREADS", "LD_PRELOAD", *MALLOC_SETTINGS)
            if name in environment
        },
    }


def _git_revision() -> str | None:
    git = shutil.which("git")
    if git is None:
        return None
    words = [git, "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None if done.returncode == 0 else None


def _program(name: str) -> Path:
    """A command of the Python that runs this, or of the path."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.is_file() else shutil.which(name)
    if found is None:
        raise ConfigError(f"{name} is not installed; install the extra: pip install 'mtmoe[train]'")
    return Path(found)
