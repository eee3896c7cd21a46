"""A TCP proxy before the database that can lose what it should pass on, the way networks do.

A connection through it may break, or hang: then what is sent is accepted and never arrives.
"""

import socket
import threading
from contextlib import suppress
from types import TracebackType
from typing import Self

from sqlalchemy import make_url

from support import free_port


class _Link:
    """One connection: the client's end and the server's."""

    def __init__(self, client: socket.socket, server: socket.socket | None) -> None:
        self.client, self.server = client, server
        self.is_deaf = server is None
        self.has_sent_first = False
        self.loses_reply = False

    def close(self) -> None:
        for end in (self.client, self.server):
            if end is not None:
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
                end.close()


class Proxy:
    """Passes everything on until it is told otherwise."""

    def __init__(self, database_url: str) -> None:
        url = make_url(database_url)
        host = str(url.query.get("host") or url.host or "127.0.0.1")
        port = url.port or 5432
        self._database = f"{host}/.s.PGSQL.{port}" if host.startswith("/") else (host, port)
        self._port = free_port()
        query = {name: value for name, value in url.query.items() if name != "host"}
        through = url.set(host="127.0.0.1", port=self._port, query={**query, "sslmode": "disable"})
        self.url = through.render_as_string(hide_password=False)
        self._lock = threading.Lock()
        self._links: list[_Link] = []
        self._swallows = False
        self._first = self._word = b""
        self._listener: socket.socket | None = None
        self.has_lost_a_reply = threading.Event()

    def __enter__(self) -> Self:
        self.mend()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.cut()

    def cut(self) -> None:
        """Break every connection, and refuse new ones."""
        with self._lock:
            listener, self._listener = self._listener, None
            links, self._links = self._links, []
        if listener is not None:
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        for link in links:
            link.close()

    def mend(self) -> None:
        """Accept connections again, and pass on what new ones send."""
        self._swallows = False
        if self._listener is None:
            listener = socket.create_server(("127.0.0.1", self._port))
            self._listener = listener
            threading.Thread(target=self._accept, args=[listener], daemon=True).start()

    def swallow(self) -> None:
        """Pass nothing on any more, of new connections neither; nobody is told."""
        self._swallows = True
        self.swallow_open()

    def swallow_open(self) -> None:
        """The same, but only for the connections that are open now."""
        with self._lock:
            for link in self._links:
                link.is_deaf = True

    def lose_reply_to(self, word: bytes, *, after: bytes = b"") -> None:
        """Once, when a client has sent ``word``: let it be done, and break before the answer.

        Args:
            word: what it sends.
            after: what it has sent before, over the same connection.
        """
        self._first, self._word = after, word

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            link = _Link(client, None if self._swallows else self._connect())
            with self._lock:
                if self._listener is not listener:
                    link.close()
                    return
                self._links.append(link)
            for pump in (self._to_server, self._to_client):
                threading.Thread(target=pump, args=[link], daemon=True).start()

    def _connect(self) -> socket.socket:
        if isinstance(self._database, tuple):
            return socket.create_connection(self._database)
        server = socket.socket(socket.AF_UNIX)
        server.connect(self._database)
        return server

    def _to_server(self, link: _Link) -> None:
        with suppress(OSError):
            while said := link.client.recv(65536):
                link.has_sent_first |= bool(self._word) and self._first in said
                if link.has_sent_first and self._word and self._word in said:
                    self._word, link.loses_reply = b"", True
                if not link.is_deaf and link.server is not None:
                    link.server.sendall(said)
        link.close()

    def _to_client(self, link: _Link) -> None:
        if link.server is None:
            return
        with suppress(OSError):
            while said := link.server.recv(65536):
                if link.loses_reply:
                    self.has_lost_a_reply.set()
                    break
                if not link.is_deaf:
                    link.client.sendall(said)
        link.close()
