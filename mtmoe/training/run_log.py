"""What fairseq-train prints: its metrics as JSON lines, all of it as text, a line of progress for the screen."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


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
        self._text = _Lines(self.folder / "train.log", self.report)
        self._metrics = _Lines(self.folder / "log.jsonl", self.report)
        return self

    def __exit__(self, *_: object) -> None:
        self._text.close()
        self._metrics.close()

    def line(self, text: str) -> None:
        """Take a line of output."""
        self._text.add(text)
        self.tail = [*self.tail[-11:], text]
        record = parse_metrics(text)
        if record is not None:
            self._metrics.add(json.dumps(record))
            summary = _summary(record)
            if summary:
                self.report(summary)
        elif "WARNING" in text or "ERROR" in text:
            self.report(text.split(" | ", 3)[-1])

    def note(self, text: str) -> None:
        """Take a line of the launcher of several processes: it goes to the text and to the screen."""
        self._text.add(text)
        self.report(text)


class _Lines:
    """Adds whole lines to a file; a full disk costs the lines that do not fit, not the training that they are of."""

    def __init__(self, path: Path, report: Callable[[str], None]) -> None:
        self._path, self._report = path, report
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        self._left_out = 0

    def add(self, text: str) -> None:
        line = (text + "\n").encode()
        start = os.fstat(self._file).st_size
        try:
            done = os.write(self._file, line)
            while done < len(line):
                done += os.write(self._file, line[done:])
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, start)  # no half lines
            if not self._left_out:
                self._report(f"{self._path} cannot be written: {error.strerror}; lines are left out")
            self._left_out += 1
            return
        if self._left_out:
            self._report(f"{self._path} can be written again; {self._left_out} lines were left out")
            self._left_out = 0

    def close(self) -> None:
        os.close(self._file)


def parse_metrics(line: str) -> dict[str, Any] | None:
    """Read the metrics from a line of fairseq's JSON log; None for any other line.

    Returns:
        ``kind`` ("train_inner" at each log interval, "train" at the end of an epoch, "valid" or the name of another
        subset, "curriculum" for what the curriculum auto decides) and the metrics as numbers, without the prefix that
        fairseq gives them.
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
    if kind == "curriculum":
        until = f" until update {record['starts']}" if record["action"] in ("wait", "move") else ""
        what = f"{record['direction']}: {record['action']}{until}"
        return f"update {record['num_updates']:>6}  curriculum  {what}; {record['reason']}"
    if kind == "train_inner":
        rates = f"{record.get('ups', 0):g} updates/s, {record.get('wps', 0):,.0f} words/s"
        return f"update {record['num_updates']:>6}  loss {record['loss']:.3f}  lr {record.get('lr', 0):.2e}  {rates}"
    if kind == "train":
        return ""
    ppl = f"  perplexity {record['ppl']:g}" if "ppl" in record else ""
    best = "".join(f"  ({key.replace('_', ' ')} {record[key]:g})" for key in record if key.startswith("best_"))
    return f"update {record['num_updates']:>6}  {kind.replace('_', ' ')} loss {record['loss']:.3f}{ppl}{best}"
