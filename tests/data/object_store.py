"""A folder served as a bucket by as much of the S3 protocol as a reader needs: an independent other end."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape


class Bucket(ThreadingHTTPServer):
    """`requests` are the lines of what was asked; bodies of objects are counted in `bytes_sent`."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.requests: list[str] = []
        self.bytes_sent = 0
        self.refuse = False

    @property
    def options(self) -> str:
        """Of an address: where this is."""
        return f"scheme=http&endpoint_override=127.0.0.1:{self.server_port}&region=us-east-1"


@contextmanager
def served(folder: Path) -> Iterator[Bucket]:
    """The folder's subfolders as buckets."""
    bucket = Bucket(folder)
    thread = threading.Thread(target=bucket.serve_forever, daemon=True)
    thread.start()
    try:
        yield bucket
    finally:
        bucket.shutdown()
        bucket.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: Bucket
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, *, with_body: bool) -> None:
        self.server.requests.append(self.requestline)
        url = urlsplit(self.path)
        query, path = parse_qs(url.query), self.server.folder / unquote(url.path).strip("/")
        if self.server.refuse:
            self._send(403, _error("AccessDenied", "no access for you"), with_body)
        elif "list-type" in query:
            self._send(200, self._listing(path, query.get("prefix", [""])[0]), with_body)
        elif path.is_dir() and "/" not in url.path.strip("/"):
            self._send(200, b"", with_body)
        elif path.is_file():
            self._object(path, with_body)
        else:
            self._send(404, _error("NoSuchKey", "no such key"), with_body)

    def _listing(self, bucket: Path, prefix: str) -> bytes:
        files = sorted(p for p in bucket.rglob("*") if p.is_file())
        keys = {p.relative_to(bucket).as_posix(): p for p in files}
        entries = "".join(
            f"<Contents><Key>{escape(key)}</Key><Size>{p.stat().st_size}</Size>"
            "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
            for key, p in keys.items()
            if key.startswith(prefix)
        )
        return (
            '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
            f"<Name>{bucket.name}</Name><IsTruncated>false</IsTruncated>{entries}</ListBucketResult>"
        ).encode()

    def _object(self, path: Path, with_body: bool) -> None:
        content = path.read_bytes()
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if wanted is None:
            status, part, more = 200, content, {}
        else:
            first, last = int(wanted[1]), min(int(wanted[2]), len(content) - 1)
            status, part = 206, content[first : last + 1]
            more = {"Content-Range": f"bytes {first}-{last}/{len(content)}"}
        self.server.bytes_sent += len(part) if with_body else 0
        self._send(status, part, with_body, more)

    def _send(self, status: int, body: bytes, with_body: bool, more: dict[str, str] | None = None) -> None:
        self.send_response(status)
        headers = {
            "Content-Length": str(len(body)),
            "Content-Type": "application/xml",
            "Last-Modified": formatdate(1767225600, usegmt=True),
            "ETag": '"0"',
            "Accept-Ranges": "bytes",
        }
        for name, value in (headers | (more or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)


def _error(code: str, message: str) -> bytes:
    return f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
