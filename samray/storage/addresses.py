"""Web addresses: which belong to this machine or a private network, and an HTTP client that avoids some of them."""

from __future__ import annotations

import ipaddress
import socket
from typing import Any, Final

from samray.errors import FileError

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_CLOUD_METADATA: Final = frozenset(
    map(ipaddress.ip_address, ("100.100.100.200", "168.63.129.16", "192.0.0.192", "fd00:ec2::254", "fd20:ce::254"))
)
"""Cloud metadata addresses in addition to the link-local 169.254.0.0/16 and fe80::/10."""
_METADATA_NAMES: Final = ("metadata", "metadata.google.internal", "metadata.goog", "instance-data")
_INTERNAL_ENDINGS: Final = (".localhost", ".local", ".internal", ".intranet", ".lan", ".home.arpa", ".localdomain")


def is_link_local(host: str) -> bool:
    """Whether `host`, as written in a URI, is a link-local or cloud metadata address or its usual name."""
    address, name = _parse(host)
    return name.startswith("instance-data.") or name in _METADATA_NAMES if address is None else _is_metadata(address)


def is_internal(host: str) -> bool:
    """Whether `host`, as written in a URI, is on this machine or a private network. Names are not looked up."""
    address, name = _parse(host)
    if address is None:
        # A name without a dot is looked up in the local network's own domain.
        return "." not in name or name.endswith(_INTERNAL_ENDINGS)
    return not address.is_global


def _parse(host: str) -> tuple[_Address | None, str]:
    """The address that `host` denotes, in any notation that a resolver accepts; and the bare name."""
    # The bare name of hosts like user@[fe80::1%eth0]:80 or name.:443.
    name = host.rpartition("@")[2].lower()
    name = name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0]
    name = name.rstrip(".")
    try:
        return _unmapped(ipaddress.ip_address(name.partition("%")[0])), name
    except ValueError:
        pass
    try:
        return ipaddress.IPv4Address(socket.inet_aton(name)), name  # 127.1, 0x7f000001, 2130706433
    except (OSError, ValueError):
        return None, name


def _unmapped(address: _Address) -> _Address:
    # ::ffff:169.254.169.254 is the server 169.254.169.254.
    return (isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped) or address


def _is_metadata(address: _Address) -> bool:
    return address.is_link_local or address in _CLOUD_METADATA


async def make_client(**options: Any) -> Any:
    """The aiohttp session of fsspec's HTTP filesystem, which refuses to connect to link-local addresses, also via a
    name that resolves to one or a redirect.
    """
    import aiohttp

    def open_socket(info: Any) -> socket.socket:
        family, kind, protocol, _, address = info
        # The address of this very connection: a check before would miss redirects and names that resolve again.
        if _is_metadata(_unmapped(ipaddress.ip_address(address[0].partition("%")[0]))):
            raise FileError(
                f"samray never connects to {address[0]}: it is a link-local address, where clouds serve credentials"
            )
        return socket.socket(family, kind, protocol)

    options.setdefault("connector", aiohttp.TCPConnector(socket_factory=open_socket))
    return aiohttp.ClientSession(**options)
