"""fairseq's commands as processes of their own."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def command(name, *arguments):
    """A command of this interpreter's environment."""
    return [str(Path(sys.executable).with_name(name)), *map(str, arguments)]


def torchrun(processes, *arguments):
    """torchrun for processes of this machine, meeting at a port that is free."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ("--nproc_per_node", processes, "--master_addr", "127.0.0.1", "--master_port", port)
    return command("torchrun", *options, *arguments)


def environment(**changes):
    """One thread, and the package of this checkout."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **changes}


def run(words, check=True, **kwargs):
    """Run a command to its end; a failure shows what it said."""
    variables = environment(**kwargs.pop("env", {}))
    seconds = kwargs.pop("timeout", 120)
    done = subprocess.run(words, capture_output=True, text=True, env=variables, timeout=seconds, **kwargs)
    if check and done.returncode:
        raise AssertionError(f"exit {done.returncode}\n{done.stdout[-6000:]}\n{done.stderr[-6000:]}")
    return done
