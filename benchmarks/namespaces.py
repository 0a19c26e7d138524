"""Several hosts on one machine: network namespaces (Linux) on a switch, over links that can be slow, or taken down.

Each host has a name and an address of its own and reaches the others through a bridge in one more namespace. Links are
full duplex: `tc` limits what a host sends at its end, and what it receives at the switch's.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

INTERFACE = "eth0"
"""Of every host, to the others."""

NETWORK = "10.213.77"
"""Nobody outside sees it."""

# A name and a hosts file of its own, so that the host finds its own address under its own name, as real ones do.
_ENTER = 'hostname "$1" && mount --bind "$2" /etc/hosts && shift 2 && exec "$@"'


@dataclass(frozen=True, slots=True)
class Host:
    """A namespace."""

    name: str
    address: str
    names: Path
    """Its ``/etc/hosts``."""

    def command(self, words: Sequence[object]) -> list[str]:
        """The words that run a command there; the process is the command's own."""
        enter = ["ip", "netns", "exec", self.name, "unshare", "--uts", "--mount", "sh", "-c", _ENTER, "sh"]
        return [*enter, self.name, str(self.names), *map(str, words)]

    def environment(self) -> dict[str, str]:
        """Variables with which processes there find each other."""
        return {**os.environ, "GLOO_SOCKET_IFNAME": INTERFACE}

    def take_down(self) -> None:
        """Cut it off from the others, without a word to them: packets are lost."""
        _run("ip", "-n", self.name, "link", "set", INTERFACE, "down")


def why_not() -> str:
    """What is missing to make hosts here; "" = nothing."""
    for program in ("ip", "tc", "unshare", "mount", "hostname"):
        if shutil.which(program) is None:
            return f"the program {program} is not installed (Debian and Ubuntu: apt install iproute2)"
    try:
        with hosts(1, rate=10**9) as (host,):
            _run(*host.command(["true"]))
    except subprocess.CalledProcessError as error:
        return f"network namespaces cannot be made here (it takes root): {error.stderr.strip()}"
    return ""


@contextlib.contextmanager
def hosts(count: int, rate: float | None = None) -> Iterator[list[Host]]:
    """Make hosts, which are gone after the block; end all processes in them before.

    Args:
        count: of hosts.
        rate: bits a second of each one's link, in each direction; None = as fast as the machine.

    Raises:
        subprocess.CalledProcessError: the system does not allow it.
    """
    run = f"mtmoe{os.getpid()}"
    switch = f"{run}-switch"
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        _add(switch, stack)
        _run("ip", "-n", switch, "link", "add", "bridge", "type", "bridge")
        _run("ip", "-n", switch, "link", "set", "bridge", "up")
        made = [_add_host(f"{run}-{number}", number, switch, rate, folder, stack) for number in range(count)]
        names = "".join(f"{host.address} {host.name}\n" for host in made)
        for host in made:
            host.names.write_text(f"127.0.0.1 localhost\n{names}", encoding="ascii")
        yield made


def _add_host(
    name: str, number: int, switch: str, rate: float | None, folder: Path, stack: contextlib.ExitStack
) -> Host:
    host, port = Host(name, f"{NETWORK}.{number + 1}", folder / name), f"port{number}"
    _add(name, stack)
    _run("ip", "-n", switch, "link", "add", port, "type", "veth", "peer", "name", INTERFACE, "netns", name)
    _run("ip", "-n", switch, "link", "set", port, "master", "bridge", "up")
    _run("ip", "-n", name, "address", "add", f"{host.address}/24", "dev", INTERFACE)
    _run("ip", "-n", name, "link", "set", "lo", "up")
    _run("ip", "-n", name, "link", "set", INTERFACE, "up")
    if rate is not None:
        # A bucket of 2 ms, and at least one packet of TCP's offload (64 KiB): smaller ones lose packets, larger ones
        # let the rate be exceeded. A queue of 50 ms.
        burst = max(65536, int(rate / 8 * 0.002))
        limits = ("root", "tbf", "rate", f"{rate:.0f}bit", "burst", f"{burst}b", "latency", "50ms")
        _run("tc", "-n", name, "qdisc", "add", "dev", INTERFACE, *limits)
        _run("tc", "-n", switch, "qdisc", "add", "dev", port, *limits)
    return host


def _add(namespace: str, stack: contextlib.ExitStack) -> None:
    _run("ip", "netns", "add", namespace)
    stack.callback(subprocess.run, ["ip", "netns", "delete", namespace], check=False, capture_output=True)


def _run(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True, text=True)
