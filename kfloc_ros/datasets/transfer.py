# SPDX-License-Identifier: Apache-2.0
"""Downloads that survive interruptions, with their checks of size and content.

A file appears under its name only when it is complete. Until then it is ``.NAME.part``, which the next attempt
continues, provided that the server says the file is still the same.
"""

from __future__ import annotations

import fnmatch
import hashlib
import http.client
import json
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote, urljoin, urlsplit

from kfloc_ros.datasets.downloads import Asset
from kfloc_ros.errors import DownloadError
from kfloc_ros.files import check_space, unpack

CHUNK_BYTES = 1 << 18
MAX_ATTEMPTS = 5
"""Attempts in a row that bring no byte before a download is given up."""
MAX_REDIRECTS = 5
MAX_PAGE_BYTES = 20_000_000
MAX_LISTED, MAX_DEPTH = 50_000, 6
MARKS = ".kfloc"
"""Folder of the notes on what was downloaded and unpacked."""

_BROKEN = (http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError, urllib.error.URLError)

OnBytes = Callable[[str, int, int | None], None]
"""Called with the name of the file, its bytes so far, and its size or None."""


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Redirects that do not leave the web, and that do not give up encryption."""

    max_redirections = MAX_REDIRECTS

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        old, new = urlsplit(req.full_url).scheme, urlsplit(newurl).scheme
        if new not in ("http", "https") or (old == "https" and new == "http"):
            raise DownloadError(f"'{req.full_url}' redirects to '{newurl}', which is not followed.")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _open(address: str, headers: dict[str, str], timeout_s: float) -> Any:
    if urlsplit(address).scheme not in ("http", "https"):
        raise DownloadError(f"'{address}' is no http or https address.")
    request = urllib.request.Request(address, headers={"User-Agent": "kfloc", **headers})
    return urllib.request.build_opener(_Redirects).open(request, timeout=timeout_s)


def fetch_file(
    address: str,
    target: Path,
    *,
    size_bytes: int | None = None,
    sha256: str = "",
    on_bytes: OnBytes | None = None,
    timeout_s: float = 60.0,
    wait_s: float = 2.0,
) -> int:
    """Download a file, continuing an earlier attempt; return its size in bytes.

    Args:
        address: http or https address.
        target: file to create; nothing appears there unless the download is complete.
        size_bytes: size that the file must have.
        sha256: checksum that the file must have.
        on_bytes: progress.
        timeout_s: longest silence of the server.
        wait_s: time before the first repetition; it doubles with each one.

    Raises:
        DownloadError: the server refuses, the file differs from what is listed, or the connection breaks repeatedly.
        OSError: the file cannot be written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part")
    failures = 0
    while True:
        before = _size(part)
        try:
            total = _continue(address, part, size_bytes, on_bytes, timeout_s)
            break
        except _BROKEN as error:
            if getattr(error, "code", 0) == 416:  # the part is longer than the file is now
                _discard(part)
            refused = _refusal(address, error)
            failures = 0 if _size(part) > before else failures + 1
            if refused or failures >= MAX_ATTEMPTS:
                raise DownloadError(refused or f"'{address}' cannot be downloaded: {_reason(error)}.") from error
            time.sleep(wait_s * 2**failures)
    if sha256 and (found := _checksum(part)) != sha256:
        _discard(part)
        raise DownloadError(f"'{address}' is damaged or was changed: its SHA-256 is {found}, listed is {sha256}.")
    part.replace(target)
    _validator_file(part).unlink(missing_ok=True)
    return total


def _continue(address: str, part: Path, size_bytes: int | None, on_bytes: OnBytes | None, timeout_s: float) -> int:
    """Append the rest of a file to its part; return the complete size."""
    have, validator = _size(part), _read_validator(part)
    if have and have == size_bytes:
        return have
    headers = {"Range": f"bytes={have}-", "If-Range": validator} if have and validator else {}
    with _open(address, headers, timeout_s) as answer:
        if "html" in answer.headers.get_content_type() and not part.name.endswith(".html.part"):
            raise DownloadError(f"'{address}' answers with a page instead of a file; open it in a browser to see why.")
        start = _start_of(answer, have)
        length = answer.headers.get("Content-Length")
        total = start + int(length) if length and length.isdigit() else None
        if size_bytes is not None and total not in (None, size_bytes):
            raise DownloadError(f"'{address}' has {total} bytes, but {size_bytes} are listed: the file was changed.")
        check_space(part.parent, (total or 0) - start)
        _validator_file(part).write_text(_validator_of(answer), encoding="utf-8")
        limit = total if total is not None else size_bytes
        done = _append(answer, part, start, limit, on_bytes)
    if limit is not None and done < limit:
        raise ConnectionError(f"it ended after {done} of {limit} bytes")
    return done


def _append(answer: IO[bytes], part: Path, start: int, limit: int | None, on_bytes: OnBytes | None) -> int:
    name = part.name.removeprefix(".").removesuffix(".part")
    done = start
    with open(part, "r+b" if start else "wb") as stream:
        stream.truncate(start)
        stream.seek(start)
        while chunk := answer.read(CHUNK_BYTES):
            done += len(chunk)
            if limit is not None and done > limit:
                raise DownloadError(f"The server sends more than the {limit} bytes of '{name}'.")
            stream.write(chunk)
            if on_bytes is not None:
                on_bytes(name, done, limit)
    return done


def _start_of(answer: Any, have: int) -> int:
    """Return the offset that an answer begins at: 0 if the server sends everything."""
    if answer.status != 206:
        return 0
    words = str(answer.headers.get("Content-Range", "")).removeprefix("bytes ").split("-", 1)
    if words[0] != str(have):
        raise http.client.HTTPException("it answers with another range than was asked for")
    return have


def _refusal(address: str, error: Exception) -> str:
    """Return why it is useless to try again, or empty."""
    if isinstance(error, urllib.error.HTTPError) and error.code < 500 and error.code not in (408, 416, 429):
        return f"'{address}' is refused by the server: {error.code} {error.reason}."
    return ""


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"{error.code} {error.reason}"
    return str(getattr(error, "reason", "") or error or type(error).__name__)


def _validator_of(answer: Any) -> str:
    """Return what identifies the version of a file, or empty; a weak ETag does not."""
    tag = str(answer.headers.get("ETag", ""))
    return tag if tag and not tag.startswith("W/") else str(answer.headers.get("Last-Modified", ""))


def _validator_file(part: Path) -> Path:
    return part.with_name(f"{part.name}.of")


def _read_validator(part: Path) -> str:
    try:
        return _validator_file(part).read_text(encoding="utf-8").strip()[:200]
    except (OSError, UnicodeDecodeError):
        return ""


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    _validator_file(part).unlink(missing_ok=True)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _checksum(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


class _Links(HTMLParser):
    """Targets of a page's links."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, None] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a" and (target := dict(attrs).get("href")):
            self.found[target] = None


def listed_files(address: str, *, exclude: tuple[str, ...] = (), timeout_s: float = 60.0) -> list[str]:
    """Return the files below a folder that the server lists, by their names relative to it.

    Links that lead anywhere else are passed over.

    Raises:
        DownloadError: a page cannot be read, or there are too many files.
    """
    found: list[str] = []
    pending = [("", 0)]
    while pending:
        folder, depth = pending.pop(0)
        for name in _children(urljoin(address, folder), timeout_s):
            if not name.endswith("/"):
                found.append(folder + name)
            elif depth < MAX_DEPTH and (folder + name).rstrip("/") not in exclude:
                pending.append((folder + name, depth + 1))
        if len(found) + len(pending) > MAX_LISTED:
            raise DownloadError(f"'{address}' lists more than {MAX_LISTED} files.")
    return found


def _children(address: str, timeout_s: float) -> Iterator[str]:
    """Yield the names that a page of a server's listing has one step below it; those of folders end with a slash."""
    try:
        with _open(address, {}, timeout_s) as answer:
            text = answer.read(MAX_PAGE_BYTES).decode("utf-8", "replace")
            base = answer.geturl()
    except (http.client.HTTPException, OSError) as error:
        raise DownloadError(_refusal(address, error) or f"'{address}' cannot be read: {_reason(error)}.") from error
    links = _Links()
    links.feed(text)
    for target in links.found:
        place = urlsplit(urljoin(base, target))
        rest = place._replace(query="", fragment="").geturl().removeprefix(base)
        plain = rest.removesuffix("/")
        name = unquote(plain)
        if place.query or not plain or "/" in name or "\\" in name or "\0" in name or ":" in name:
            continue
        if not name.startswith((".", "index.html")):
            yield rest


def obtain(
    asset: Asset, address: str, root: Path, *, on_bytes: OnBytes | None = None, keep_archives: bool = False
) -> bool:
    """Download an asset into its folder and unpack it; return False if it was there already.

    Raises:
        DownloadError: see :func:`fetch_file`, :func:`listed_files` and :func:`unpack`.
        OSError: a file cannot be written.
    """
    folder = root / asset.folder
    mark = folder / MARKS / f"{asset.name.strip('/').replace('/', '_')}.json"
    if mark.is_file():
        return False
    size = 0
    if asset.is_listing:
        for name in listed_files(address, exclude=asset.exclude):
            target = folder / unquote(name)
            if not target.is_file():
                size += fetch_file(urljoin(address, name), target, on_bytes=on_bytes)
        archives = sorted(folder.glob(asset.unpack)) if asset.unpack else []
        for archive in archives:
            _unpack_and_remove(archive, archive.parent, keep=keep_archives)
    else:
        target = folder / asset.name
        if not target.is_file():
            size = fetch_file(
                address, target, size_bytes=asset.size_bytes, sha256=asset.sha256, on_bytes=on_bytes
            )  # fmt: skip
        if target.name.endswith((".zip", ".tar", ".tar.gz", ".tgz")):
            inner = [name for name in unpack(target, folder) if asset.unpack and fnmatch.fnmatch(name, asset.unpack)]
            for name in inner:
                _unpack_and_remove(folder / name, (folder / name).parent, keep=False)
            if not keep_archives:
                target.unlink()
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.write_text(json.dumps({"address": address, "bytes": size, "sha256": asset.sha256}) + "\n", encoding="utf-8")
    return True


def _unpack_and_remove(archive: Path, folder: Path, *, keep: bool) -> None:
    unpack(archive, folder)
    if not keep:
        archive.unlink()
