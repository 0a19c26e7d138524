"""SIGTERM and SIGINT end training between two updates, with a checkpoint; a second signal ends it at once."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from types import FrameType
from typing import Any

from fairseq import checkpoint_utils

from fairseq_plugins.checkpoints import last_save
from fairseq_plugins.processes import distributed, largest
from mtmoe.training.process import ECHO_SECONDS

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequested(Exception):
    """Breaks off a validation that a signal came into."""


class Stopper:
    """Remembers that a signal asked training to stop."""

    def __init__(self) -> None:
        self.signal = 0
        """Number of the signal that came; 0 = none."""
        self._since = 0.0

    def install(self) -> None:
        """Catch the signals from now on; only the main thread may, others leave it."""
        if threading.current_thread() is threading.main_thread() and signal.getsignal(SIGNALS[0]) != self._catch:
            for number in SIGNALS:
                signal.signal(number, self._catch)

    def _catch(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if not self.signal:
            self.signal, self._since = number, now
        elif now - self._since > ECHO_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def agreed(self) -> bool:
        """Whether any process of the run was asked; all processes have to call this together."""
        self.signal = largest(self.signal)
        return self.signal != 0

    def interrupt(self) -> None:
        """Break off a validation if a signal came; processes must not part ways, so only where there is one.

        Raises:
            StopRequested: a signal came.
        """
        if self.signal and not distributed():
            raise StopRequested


stopper = Stopper()
"""The one of this process: signals belong to processes."""


def stopping(validate_and_save: Any) -> Any:
    """Wrap fairseq's function of that name, which runs after every update: save and leave when a signal came."""

    def wrapped(cfg: Any, trainer: Any, task: Any, epoch_itr: Any, *args: Any, **kwargs: Any) -> Any:
        asked = stopper.agreed()
        # Where training learns from each validation, one that is due comes before the end: a resumed run does not
        # make up for it.
        if not asked or getattr(task, "learns_from_validation", False):
            try:
                result = validate_and_save(cfg, trainer, task, epoch_itr, *args, **kwargs)
            except StopRequested:
                logger.warning("the validation at update %d was broken off", trainer.get_num_updates())
            else:
                if result[1] or not stopper.signal:
                    return result
                if not asked and distributed():
                    return result  # the others learn of it after the next update
        checkpoint_utils.save_checkpoint(cfg.checkpoint, trainer, epoch_itr, None)
        last_save.check()
        largest(0)  # nobody leaves while one still writes: launchers end all when one has ended
        logger.warning(
            "stopped by %s after update %d; run the same command again to go on from %s/checkpoint_last.pt",
            signal.Signals(stopper.signal).name, trainer.get_num_updates(), cfg.checkpoint.save_dir,
        )  # fmt: skip
        raise SystemExit(128 + stopper.signal)

    return wrapped
