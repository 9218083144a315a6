"""A small server for pages that one person looks at on one machine: bound to 127.0.0.1 and to nothing else.

What a web page from elsewhere could try is refused: a request whose `Host` is no name of this machine (DNS rebinding),
or whose `Origin` is another page. There are no paths of files here: an address leads to a function or to nothing. A
request that cannot be answered is a sentence with its status; it never ends the server.
"""

from __future__ import annotations

import json
import re
import socketserver
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from vlm.errors import ConfigError, VLMError

HOST = "127.0.0.1"
MAX_BODY = 32 * 2**20
"""Bytes that may be sent with a request."""
MAX_FIELDS = 100
"""Values that the address of a request may give."""
SILENT_S = 30
"""A connection on which nothing comes for so many seconds is closed."""
_NAMES = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:[0-9]{1,5})?", re.IGNORECASE)
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


class Refused(VLMError):
    """A request that is answered with a sentence; `status` is HTTP's."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, kw_only=True)
class Request:
    """What was asked.

    Attributes:
        path: the address without what follows `?`, decoded.
        fields: what follows it: name -> values, blank ones too.
        body: what was sent with it.
    """

    path: str
    fields: Mapping[str, list[str]] = field(default_factory=dict)
    body: bytes = b""


@dataclass(frozen=True, kw_only=True)
class Response:
    """What is answered: bytes, their media type, further headers."""

    body: bytes
    kind: str
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)


Answer = Callable[[Request], Response]
"""Answers a request, in a thread of its own. A `VLMError` becomes status 400, `Refused` the status that it says."""


def in_json(value: Any, status: int = 200) -> Response:
    """A value as JSON that nobody keeps."""
    body = json.dumps(value).encode("ascii")
    return Response(body=body, kind="application/json", status=status, headers={"Cache-Control": "no-store"})


class LocalServer(ThreadingHTTPServer):
    """Answers requests from this machine, each connection in a thread of its own.

    Args:
        answer: what answers.
        port: 0 takes any free one.

    Raises:
        ConfigError: the port is taken, or not allowed.
    """

    daemon_threads = True
    block_on_close = False
    allow_reuse_address = sys.platform != "win32"  # there it would take a port that another program listens on

    def __init__(self, answer: Answer, port: int = 0) -> None:
        if not 0 <= port < 65536:
            raise ConfigError(f"port {port}: expected 1 to 65535, or 0 for any free one")
        try:
            super().__init__((HOST, port), partial(_Handler, answer))
        except OSError as error:
            raise ConfigError(
                f"port {port} cannot be used: {error.strerror}; give another one, or 0 for any free"
            ) from error

    @property
    def address(self) -> str:
        """Where a browser finds it."""
        return f"http://{HOST}:{self.server_address[1]}/"

    def server_bind(self) -> None:
        """Without asking the network for this machine's name, as `HTTPServer` does."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = HOST, int(self.server_address[1])

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A reader that has gone is no error; anything else is a bug of ours, and keeps its traceback."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "vlm", ""
    timeout = SILENT_S

    def __init__(self, answer: Answer, *connection: Any) -> None:
        self._answer = answer
        super().__init__(*connection)

    def do_GET(self) -> None:
        if "Content-Length" in self.headers or "Transfer-Encoding" in self.headers:
            self.close_connection = True  # what was sent is not read
        self._send(self._answered(lambda: b""))

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        self._send(self._answered(self._body))

    def _answered(self, body: Callable[[], bytes]) -> Response:
        try:
            self._check_sender()
            return self._answer(self._request(body()))
        except Refused as error:
            self.close_connection = True  # what was sent may be still on its way
            return in_json({"error": str(error)}, error.status)
        except VLMError as error:
            return in_json({"error": str(error)}, 400)

    def _check_sender(self) -> None:
        hosts = self.headers.get_all("Host", [])
        if len(hosts) != 1 or not _NAMES.fullmatch(hosts[0].strip()):
            said = ", ".join(hosts) or "nothing"
            raise Refused(403, f"the request is for the host {said[:200]!r}; this server answers for 127.0.0.1 alone")
        origin = self.headers.get("Origin")
        if origin is not None and origin.lower() != f"http://{hosts[0].strip()}".lower():
            raise Refused(403, f"the request comes from the page {origin[:200]!r}; only the server's own page may ask")

    def _request(self, body: bytes) -> Request:
        try:
            parts = urlsplit(self.path)
            fields = parse_qs(parts.query, keep_blank_values=True, errors="strict", max_num_fields=MAX_FIELDS)
            return Request(path=unquote(parts.path, errors="strict"), fields=fields, body=body)
        except ValueError as error:
            raise Refused(400, f"the address of the request cannot be read: {error}") from error

    def _body(self) -> bytes:
        stated = self.headers.get_all("Content-Length", [])
        if (
            len(stated) != 1
            or not re.fullmatch("[0-9]{1,18}", stated[0].strip())
            or "Transfer-Encoding" in self.headers
        ):
            raise Refused(411, "what is sent needs its length in bytes (Content-Length)")
        length = int(stated[0])
        if length > MAX_BODY:
            raise Refused(413, f"{length:,} bytes were sent; at most {MAX_BODY:,} are taken")
        body = self.rfile.read(length)
        if len(body) != length:
            raise Refused(400, f"{length:,} bytes were announced and {len(body):,} came")
        return body

    def _send(self, response: Response) -> None:
        self.send_response(response.status)
        for name, value in {**_HEADERS, **response.headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Type", response.kind)
        self.send_header("Content-Length", str(len(response.body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(response.body)

    def log_message(self, format: str, *values: Any) -> None:
        """Nothing: the terminal shows what the person who started it should know."""
