"""Engines found by name: a host whose addresses are the engines, as of a headless Service of Kubernetes."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urlsplit


@dataclass(frozen=True, slots=True)
class Discovery:
    """Engines that come and go.

    Attributes:
        url: ``http://HOST:PORT``; all addresses of the host are engines.
        most_engines: places for them; policies see so many, the vacant ones as unavailable.
    """

    url: str
    most_engines: int


_NOBODY = (socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME))


def endpoint_of(address: str, port: int) -> str:
    """Return ``host:port`` of an IP address.

    >>> endpoint_of("::1", 80)
    '[::1]:80'
    """
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


async def resolve(host: str, port: int) -> frozenset[str]:
    """Return the engines behind a name, ``address:port`` each; none where nobody has the name.

    Raises:
        OSError: the name server does not answer, which says nothing of the engines.
    """
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        if error.errno in _NOBODY:
            return frozenset()
        raise
    return frozenset(endpoint_of(str(address[0]), port) for *_, address in found)


async def discover(url: str, found: Callable[[frozenset[str]], None], *, period_s: float = 2.0) -> None:
    """Ask for the engines behind a name again and again, until cancelled.

    Args:
        url: ``http://HOST:PORT``.
        found: told of the engines, ``address:port`` each, after each answer.
        period_s: between two questions.
    """
    parts = urlsplit(url)
    assert parts.hostname is not None
    assert parts.port is not None
    while True:
        try:
            engines = await resolve(parts.hostname, parts.port)
        except OSError:
            pass  # those known stay; that they answer is asked of themselves
        else:
            found(engines)
        await asyncio.sleep(period_s)
