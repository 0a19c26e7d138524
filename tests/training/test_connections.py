"""Connections that are to fail when the other side is out of reach; `tests/fairseq_plugins/test_faults.py` cuts one."""

import socket

import pytest

from mtmoe.training.connections import give_up_after

pytestmark = pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="an option of Linux")


def options(connection):
    limit = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
    return limit, connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


def test_both_ends_of_a_connection_to_the_port_and_no_others_get_the_limit():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_server(("127.0.0.1", 0)) as other:
        with (
            socket.create_connection(server.getsockname()) as client, server.accept()[0] as accepted,
            socket.create_connection(other.getsockname()) as bystander,
        ):  # fmt: skip
            assert give_up_after(30, server.getsockname()[1]) == 2
            assert [options(each) for each in (client, accepted, bystander, server)] == [
                (30_000, 1), (30_000, 1), (0, 0), (0, 0),
            ]  # fmt: skip
            client.sendall(b"still open")
            assert accepted.recv(10) == b"still open"


def test_a_port_that_nobody_uses_has_no_connections():
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert give_up_after(30, server.getsockname()[1]) == 0
