"""Become a command that ends with the process that started it, even where that one is killed with SIGKILL.

Run by its path, as ``bound_process.py PARENT COMMAND [WORD ...]``; `bound` gives the words. Linux sends a process the
signal of ``PR_SET_PDEATHSIG`` when the thread that started it ends, and exec keeps that setting. It is made here, in a
new program, and not between fork and exec (``preexec_fn``), where Python code may deadlock on a lock that another
thread of the parent held. A process that its parent has left already does not begin.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence

PR_SET_PDEATHSIG = 1
"""Of ``linux/prctl.h``."""


def bound(command: Sequence[str]) -> list[str]:
    """The words that run `command` so that it ends with this process, its errors among its output.

    Start them from a thread that lives as long as the command should.
    """
    # -I -S: neither the user's paths nor site-packages are needed, so that this takes some 20 ms.
    return [sys.executable, "-I", "-S", os.path.abspath(__file__), str(os.getpid()), *command]  # noqa: PTH100


def main(parent: int, command: Sequence[str]) -> int:
    """Bind this process to `parent`, and turn into `command`.

    Returns:
        An exit status, if that cannot be done.
    """
    prctl = getattr(ctypes.CDLL(None, use_errno=True), "prctl", None)
    if prctl is None or prctl(PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        print("this system cannot end a process with its parent; look for leftovers after a SIGKILL", file=sys.stderr)
    if os.getppid() != parent:  # it ended before the setting was made, and nobody will be told
        return 128 + signal.SIGKILL
    os.dup2(1, 2)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores it, and exec would keep that
    try:
        os.execvp(command[0], list(command))
    except OSError as error:
        print(f"{command[0]} cannot be run: {error.strerror}", file=sys.stderr)
    return 127


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
