"""Write while training goes on: one job at a time, in a thread that the end of the process waits for."""

from __future__ import annotations

import threading
from collections.abc import Callable


class BackgroundWriter:
    """Runs jobs in a thread, one after the other; the error of one is raised when the next is given, or waited for."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    @property
    def busy(self) -> bool:
        """Whether a job is under way."""
        return self._thread is not None and self._thread.is_alive()

    def submit(self, job: Callable[[], object]) -> None:
        """Start a job, once the one before has ended.

        Args:
            job: touches nothing that the caller changes later.

        Raises:
            Exception: what the job before raised; the new one is not started.
        """
        self.wait()

        def run() -> None:
            try:
                job()
            except Exception as error:  # it belongs to the thread that saves next
                self._error = error

        # No daemon: the interpreter waits for it at its end.
        self._thread = threading.Thread(target=run, name="checkpoint", daemon=False)
        self._thread.start()

    def wait(self) -> None:
        """Wait until nothing is under way.

        Raises:
            Exception: what the last job raised; a second call does not raise it again.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error
