"""Connections of this process that end when the other side is out of reach, not a quarter of an hour later."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

PROBES = 3
"""Unanswered ones after which a connection without traffic is lost."""


def give_up_after(seconds: float, port: int) -> int:
    """Let connections to a port, and from it, fail when nothing has come back for so long.

    torch's stores read without a limit of time. Where a link is lost, and not closed, Linux would go on sending the
    same packets for some 15 minutes (``tcp_retries2``) while the reader waits.

    Args:
        seconds: until then.
        port: of the store. Its sockets are torch's own, so they are found among the open files of this process.

    Returns:
        How many there are; 0 also where the system has no such option.
    """
    found = 0
    for connection in _connections(port):
        if not hasattr(socket, "TCP_USER_TIMEOUT"):
            break
        with connection:
            interval = max(1, int(seconds / (PROBES + 1)))
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * seconds))
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, interval)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, interval)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, PROBES)
            found += 1
    return found


def _connections(port: int) -> Iterator[socket.socket]:
    folder = Path("/proc/self/fd")
    for entry in list(folder.iterdir()) if folder.is_dir() else []:
        try:
            if not str(entry.readlink()).startswith("socket:"):
                continue
            candidate = socket.socket(fileno=os.dup(int(entry.name)))
        except OSError:  # closed meanwhile
            continue
        try:
            wanted = candidate.type == socket.SOCK_STREAM and port in (
                candidate.getpeername()[1], candidate.getsockname()[1]
            )  # fmt: skip
        except (OSError, IndexError):  # it listens, or has no ports
            wanted = False
        if wanted:
            yield candidate
        else:
            candidate.close()
