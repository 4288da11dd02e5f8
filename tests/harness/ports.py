"""`free_port`: a port for a job of a test, which no other process is given meanwhile."""

import socket

_held: list[socket.socket] = []
"""Bound and not listening: who asks the system for any port gets another one, and who asks for this
one and may share addresses, as servers do, gets it. They end with this process."""


def free_port() -> int:
    """A port of 127.0.0.1 at which nobody listens.

    A port that was merely free a moment ago may be the next that the system gives to another test.
    """
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("127.0.0.1", 0))
    _held.append(holder)
    port: int = holder.getsockname()[1]
    return port
