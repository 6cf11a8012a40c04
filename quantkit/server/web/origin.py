"""Find out where a request comes from: the host name that it asked for, the site that sent it, the
address.
"""

from __future__ import annotations

import hmac
import ipaddress
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from quantkit.errors import UsageError

Site = Literal["own", "other", "unknown"]
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
HUB = "https://huggingface.co"
FROM = "x-quantkit-from"  # the address of a request that the MCP server passes on to this server

_HOST = re.compile(r"([a-z0-9_.-]{1,253}|\[[0-9a-f:.]{2,45}\])(?::[0-9]{1,5})?", re.ASCII)
_ALL = ("0.0.0.0/0", "::/0")
_LOOPBACK = ("127.0.0.0/8", "::1/128")


def name_of(host: str) -> str | None:
    """Return the name in a Host header or an origin, without its port; None for anything else."""
    match = _HOST.fullmatch(host.lower())
    return None if match is None else match[1].strip("[]")


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        found = ipaddress.ip_address(text)
    except ValueError:
        return None
    mapped = getattr(found, "ipv4_mapped", None)
    return mapped if mapped is not None else found


def _is_loopback(name: str) -> bool:
    address = _address(name)
    return name == "localhost" or (address is not None and address.is_loopback)


@dataclass(frozen=True)
class Places:
    """The host names of this server, and the proxies that it trusts about a visitor's address."""

    on_space: bool
    listed: frozenset[str]  # names that were set for it, with a port where there is one
    names: frozenset[str]  # the same without ports, and the one that it listens at
    any_address: bool  # it listens everywhere: an address as a name cannot be rebound by DNS
    proxies: tuple[Network, ...]
    _secret: bytes

    @classmethod
    def of(cls, environment: Mapping[str, str], on_space: bool) -> Places:
        """Raise UsageError for a setting that cannot be read."""
        text = environment.get("SPACE_HOST" if on_space else "QUANTKIT_HOSTS", "").lower()
        listed = frozenset(part.strip() for part in text.split(",") if part.strip())
        for part in listed:
            if name_of(part) is None:
                raise UsageError(
                    f"{part!r} is not the name of a host.",
                    "Set QUANTKIT_HOSTS to names such as quantkit.example.org, by commas.",
                )
        listens = environment.get("GRADIO_SERVER_NAME", "").strip().lower().strip("[]")
        everywhere = listens in ("0.0.0.0", "::")
        names = {str(name_of(part)) for part in listed} | {listens} - {"", "0.0.0.0", "::"}
        usual = _ALL if on_space else _LOOPBACK if listed else ()
        proxies = _networks(environment.get("QUANTKIT_PROXIES", ""), usual)
        return cls(on_space, listed, frozenset(names), everywhere, proxies, secrets.token_bytes(32))

    def serves(self, host: str) -> bool:
        """Return whether this server goes by the name that a request asked for.

        Any other is a stranger's that was made to lead here (DNS rebinding). A Space is reached
        through the Hub's proxy alone, which chooses the Space by its name.
        """
        name = name_of(host)
        if name is None:
            return False
        if self.on_space or name in self.names or _is_loopback(name):
            return True
        return self.any_address and _address(name) is not None

    def owns(self, origin: str, host: str) -> bool:
        """Return whether an origin is this page: the name and port asked for, or a name set for
        it.
        """
        scheme, _, rest = origin.lower().partition("://")
        name = name_of(rest)
        if scheme not in ("http", "https") or name is None:
            return False
        if rest in self.listed:
            return scheme == "https" or not self.on_space
        # A browser never asks a Space for another name than the one that it was given.
        elsewhere = self.on_space and self.listed and not _is_loopback(name)
        return rest == host.lower() and not elsewhere

    def site(self, headers: Mapping[str, str]) -> Site:
        """Return whose page sent the request, by what browsers say and scripts cannot change."""
        host = headers.get("host", "")
        said: set[bool] = set()
        if "origin" in headers:
            said.add(self.owns(headers["origin"], host))
        if "sec-fetch-site" in headers:  # none: typed, or from the bookmarks
            said.add(headers["sec-fetch-site"] in ("same-origin", "none"))
        if not said and "referer" in headers:
            scheme, _, rest = headers["referer"].partition("://")
            said.add(self.owns(f"{scheme}://{rest.partition('/')[0]}", host))
        if not said:
            return "unknown"
        return "own" if said == {True} else "other"

    def trusts(self, peer: str) -> bool:
        address = _address(peer)
        return address is not None and any(
            address.version == network.version and address in network for network in self.proxies
        )

    def address(self, peer: str, headers: Mapping[str, str]) -> str:
        """Return the visitor's address: the one that the last trusted proxy saw, else the
        peer's.
        """
        passed = headers.get(FROM, "")
        address, _, signature = passed.rpartition(" ")
        if address and hmac.compare_digest(signature.encode(), self._sign(address).encode()):
            return address
        if self.trusts(peer):
            seen = headers.get("x-forwarded-for", "").rpartition(",")[2].strip()
            return seen if _address(seen) is not None else peer
        return peer

    def passed_on(self, address: str) -> bytes:
        """Return the header by which this server knows the address in a request that it sends
        itself.
        """
        return f"{address} {self._sign(address)}".encode()

    def _sign(self, address: str) -> str:
        return hmac.new(self._secret, address.encode(), "sha256").hexdigest()


def counted(address: str) -> str:
    """Return what an address is counted as: one customer has a whole /64 of IPv6."""
    found = _address(address)
    if found is None:
        return address[:64]
    if found.version == 6:
        return str(ipaddress.ip_network((found, 64), strict=False))
    return str(found)


def _networks(text: str, usual: Sequence[str]) -> tuple[Network, ...]:
    listed = [part.strip() for part in text.split(",") if part.strip()] or usual
    try:
        return tuple(ipaddress.ip_network(part, strict=False) for part in listed)
    except ValueError as error:
        raise UsageError(
            f"QUANTKIT_PROXIES={text} is not a list of addresses: {error}.",
            "Give addresses or networks such as 10.0.0.0/8, by commas.",
        ) from None
