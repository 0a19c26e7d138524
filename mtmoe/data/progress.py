"""What a long job tells while it runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


class Progress:
    """Says nothing; a command passes a subclass that shows it."""

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def say(self, text: str) -> None:
        """Tell an event, one line."""

    def start(self, title: str, total: int | None = None) -> None:
        """Begin a step of `total` units, or of nobody knows how many."""

    def advance(self, units: int = 1) -> None:
        """Tell that some units of the step are done."""

    def finish(self) -> None:
        """End the step."""

    def track(self, title: str, items: Iterable[T], total: int | None = None, every: int = 1000) -> Iterator[T]:
        """Give the items, and advance while doing so."""
        self.start(title, total)
        waiting = 0
        for item in items:
            yield item
            waiting += 1
            if waiting == every:
                self.advance(waiting)
                waiting = 0
        self.advance(waiting)
        self.finish()
