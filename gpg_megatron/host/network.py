"""Which of this host's addresses and interfaces lead to another host."""

from __future__ import annotations

import socket

from gpg_megatron.errors import UserError


def address_towards(host: str) -> str:
    """This host's IPv4 address as `host` sees it; what its own name resolves to may be a loopback
    address. Nothing is sent. Raises UserError: the name does not resolve, or nothing leads there.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))
        except OSError as error:
            raise UserError(f"host {host}: {error.strerror}; expected a name or address") from None
        return str(probe.getsockname()[0])


def interface_of(address: str) -> str:
    """The name of the interface that has an address of this host."""
    import psutil

    for name, addresses in psutil.net_if_addrs().items():
        if any(a.family == socket.AF_INET and a.address == address for a in addresses):
            return str(name)
    raise UserError(f"no network interface of this host has the address {address}")


def free_port() -> int:
    """A port that nothing uses at this moment."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
