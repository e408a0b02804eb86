"""Who may reach the page: this machine's browser, or a user with a password.

    FINTUNE_CHAT_USER, FINTUNE_CHAT_PASSWORD    asked for on any address but loopback, and there too if set

A page of another site can send requests to loopback, and with a name of its own for this machine (DNS
rebinding) read the answers; so the names by which this page is reached are checked as well.
"""

import base64
import ipaddress
import os
import secrets
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from fintune.errors import UserError

USER, PASSWORD = "FINTUNE_CHAT_USER", "FINTUNE_CHAT_PASSWORD"
SHORTEST = 8


@dataclass(frozen=True)
class Access:
    """The names by which the page is reached, None for any, and the user and password, if asked for."""

    names: frozenset[str] | None
    login: tuple[str, str] | None

    def fault(self, headers: Headers) -> int | None:
        """Return the HTTP status with which to refuse a request, or None."""
        host, origin = headers.get("host", ""), headers.get("origin")
        if self.names is not None and (urlsplit(f"//{host}").hostname or "") not in self.names:
            return 403
        if origin is not None and urlsplit(origin).netloc != host:
            return 403
        return None if self.login is None or self._is_user(headers) else 401

    def _is_user(self, headers: Headers) -> bool:
        kind, _, given = headers.get("authorization", "").partition(" ")
        try:
            user, _, password = base64.b64decode(given).partition(b":")
        except ValueError:
            return False
        known = [text.encode() for text in self.login or ()]
        same = [secrets.compare_digest(*pair) for pair in zip((user, password), known, strict=True)]
        return kind.lower() == "basic" and all(same)


def access_to(host: str) -> Access:
    """Return who may reach a page at this address.

    Raises:
        UserError: others can reach it, and the environment has no user and password; or one of the two.
    """
    user, password = os.environ.get(USER, ""), os.environ.get(PASSWORD, "")
    if bool(user) != bool(password) or (password and len(password) < SHORTEST):
        raise UserError(f"set both {USER} and {PASSWORD}, of at least {SHORTEST} characters")
    login = (user, password) if user else None
    if is_loopback(host):
        return Access(frozenset({"localhost", "127.0.0.1", "::1", host}), login)
    if login is None:
        raise UserError(
            f"--host {host}: others could reach the page; set {USER} and {PASSWORD} to a user and a password "
            "that they are asked for, or leave --host out"
        )
    return Access(None, login)


def is_loopback(host: str) -> bool:
    """Return whether an address is reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Guard:
    """A layer around the page's server that refuses others' requests."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self.app, self.access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        status = None
        if scope["type"] in ("http", "websocket"):
            status = self.access.fault(Headers(scope=scope))
        if status is None:
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            asks = {"WWW-Authenticate": 'Basic realm="fintune chat"'} if status == 401 else {}
            text = "user and password needed" if status == 401 else "not by this name"
            await PlainTextResponse(text, status, asks)(scope, receive, send)
