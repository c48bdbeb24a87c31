# SPDX-License-Identifier: Apache-2.0
"""`kfloc download` against a server on this machine: interruptions, redirects, refusals and hostile archives."""

from __future__ import annotations

import hashlib
import io
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from kfloc_ros.cli.main import main
from kfloc_ros.datasets.downloads import COLLECTIONS, Asset, assets_of, mirrored
from kfloc_ros.datasets.transfer import fetch_file, listed_files, obtain
from kfloc_ros.errors import DownloadError
from kfloc_ros.files import unpack

CONTENT = bytes(range(256)) * 4000


class Server:
    """Files by path. ``cut``: bytes after which the connection breaks, once each. ``moved``: redirects by path."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.cut: dict[str, list[int]] = {}
        self.moved: dict[str, str] = {}
        self.pages: dict[str, str] = {}
        self.etag, self.asked = '"1"', []  # type: ignore[var-annotated]
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, format: str, *args: Any) -> None:
                pass

            def do_GET(self) -> None:
                outer.answer(self)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = request.path
        self.asked.append((path, request.headers.get("Range")))
        if path in self.moved:
            request.send_response(302)
            request.send_header("Location", self.moved[path])
            request.end_headers()
            return
        if path in self.pages:
            data, kind = self.pages[path].encode(), "text/html"
        elif path in self.files:
            data, kind = self.files[path], "application/octet-stream"
        else:
            request.send_error(403)
            return
        start = 0
        if (asked := request.headers.get("Range")) and request.headers.get("If-Range") == self.etag:
            start = int(asked.removeprefix("bytes=").split("-")[0])
        if start > len(data):
            request.send_error(416)
            return
        request.send_response(206 if start else 200)
        if start:
            request.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        request.send_header("Content-Type", kind)
        request.send_header("Content-Length", str(len(data) - start))
        request.send_header("ETag", self.etag)
        request.end_headers()
        stops = self.cut.get(path, [])
        request.wfile.write(data[start : start + stops.pop(0)] if stops else data[start:])


@pytest.fixture
def server() -> Iterator[Server]:
    found = Server()
    yield found
    found.close()


def get(server: Server, target: Path, path: str = "/data.bin", **rest: Any) -> int:
    return fetch_file(server.address + path, target, wait_s=0.001, timeout_s=5, **rest)


def test_an_interrupted_download_goes_on_where_it_ended(server: Server, tmp_path: Path) -> None:
    server.files["/data.bin"] = CONTENT
    server.cut["/data.bin"] = [100_000, 300_000]
    seen: list[int] = []
    digest = hashlib.sha256(CONTENT).hexdigest()
    assert get(server, tmp_path / "a", sha256=digest, on_bytes=lambda _, done, __: seen.append(done)) == len(CONTENT)
    assert (tmp_path / "a").read_bytes() == CONTENT
    assert [asked for _, asked in server.asked] == [None, "bytes=100000-", "bytes=400000-"]
    assert seen == sorted(seen) and seen[-1] == len(CONTENT)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_later_command_continues_a_part_unless_the_file_was_changed(server: Server, tmp_path: Path) -> None:
    server.files["/data.bin"] = CONTENT
    for etag, asked in (('"1"', "bytes=70000-"), ('"2"', "bytes=70000-")):
        server.cut["/data.bin"] = [70_000] + [0] * 20
        server.etag = '"1"'
        with pytest.raises(DownloadError, match="cannot be downloaded"):
            get(server, tmp_path / "a")
        assert not (tmp_path / "a").exists()
        server.cut.clear()
        server.asked.clear()
        server.etag = etag
        get(server, tmp_path / "a")
        assert server.asked == [("/data.bin", asked)]
        assert (tmp_path / "a").read_bytes() == CONTENT
        (tmp_path / "a").unlink()


def test_a_part_longer_than_the_file_is_begun_anew(server: Server, tmp_path: Path) -> None:
    server.files["/data.bin"] = CONTENT[:500]
    (tmp_path / ".a.part").write_bytes(b"x" * 900)
    (tmp_path / ".a.part.of").write_text('"1"')
    assert get(server, tmp_path / "a") == 500
    assert (tmp_path / "a").read_bytes() == CONTENT[:500]


@pytest.mark.parametrize(
    ("listed", "message"),
    [({"size_bytes": 17}, "17 are listed"), ({"sha256": "0" * 64}, "SHA-256")],
)
def test_another_file_than_listed_is_refused(
    server: Server, tmp_path: Path, listed: dict[str, Any], message: str
) -> None:
    server.files["/data.bin"] = CONTENT
    with pytest.raises(DownloadError, match=message):
        get(server, tmp_path / "a", **listed)
    assert list(tmp_path.glob("*")) == []


def test_redirects_are_followed_within_the_web_only(server: Server, tmp_path: Path) -> None:
    server.files["/data.bin"] = CONTENT
    server.moved = {"/old": "/data.bin", "/disk": "file:///etc/passwd", "/ftp": "ftp://a.org/x", "/loop": "/loop"}
    assert get(server, tmp_path / "a", "/old") == len(CONTENT)
    with pytest.raises(DownloadError, match="not allowed"):
        get(server, tmp_path / "b", "/disk")
    with pytest.raises(DownloadError, match="not followed"):
        get(server, tmp_path / "b", "/ftp")
    with pytest.raises(DownloadError, match="refused by the server"):
        get(server, tmp_path / "c", "/loop")
    with pytest.raises(DownloadError, match="no http"):
        fetch_file("file:///etc/passwd", tmp_path / "d")
    assert sorted(path.name for path in tmp_path.glob("[a-d]")) == ["a"]


def test_a_refused_path_and_a_page_are_told_at_once(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="403"):
        get(server, tmp_path / "a", "/forbidden")
    assert len(server.asked) == 1
    server.pages["/quota"] = "<html>Too many users have viewed this file.</html>"
    with pytest.raises(DownloadError, match="page instead of a file"):
        get(server, tmp_path / "a", "/quota")


def test_a_folder_is_listed_without_what_leads_elsewhere(server: Server, tmp_path: Path) -> None:
    server.pages["/set/"] = (
        '<a href="?C=N">Name</a><a href="/">Parent</a><a href="../other/">up</a><a href="http://example.org/x">x</a>'
        '<a href="%2e%2e/evil">e</a><a href="a%2f..%2fb">e</a><a href=".hidden">h</a><a href="index.html">i</a>'
        '<a href="lists/">lists</a><a href="3D-models/">m</a><a href="one%20two.txt">t</a><a href="/set/abs.txt">a</a>'
    )
    server.pages["/set/lists/"] = '<a href="/set/">Parent</a><a href="pairs.txt">p</a>'
    server.files |= {"/set/one%20two.txt": b"1", "/set/abs.txt": b"2", "/set/lists/pairs.txt": b"3"}
    assert listed_files(f"{server.address}/set/", exclude=("3D-models",)) == [
        "one%20two.txt", "abs.txt", "lists/pairs.txt",
    ]  # fmt: skip
    asset = Asset(f"{server.address}/set/", "Set", exclude=("3D-models",))
    assert obtain(asset, asset.address, tmp_path)
    assert (tmp_path / "Set" / "one two.txt").read_bytes() == b"1"
    assert (tmp_path / "Set" / "lists" / "pairs.txt").read_bytes() == b"3"
    server.asked.clear()
    assert not obtain(asset, asset.address, tmp_path)
    assert server.asked == []


def zip_of(path: Path, files: dict[str, bytes], mode: int = 0) -> Path:
    with zipfile.ZipFile(path, "w") as packed:
        for name, data in files.items():
            item = zipfile.ZipInfo(name)
            item.external_attr = mode << 16
            packed.writestr(item, data)
    return path


def tar_of(path: Path, *members: tuple[str, bytes, bytes, str]) -> Path:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as packed:
        for name, data, kind, link in members:
            item = tarfile.TarInfo(name)
            item.type, item.size, item.linkname = kind, len(data), link
            packed.addfile(item, io.BytesIO(data))
    return path


HOSTILE: dict[str, Callable[[Path], Path]] = {
    "zip, steps up": lambda p: zip_of(p / "a.zip", {"good": b"1", "x/../../evil": b"2"}),
    "zip, absolute": lambda p: zip_of(p / "a.zip", {"good": b"1", "/tmp/evil": b"2"}),
    "zip, Windows": lambda p: zip_of(p / "a.zip", {"good": b"1", "..\\evil": b"2"}),
    "zip, link": lambda p: zip_of(p / "a.zip", {"link": b"/etc"}, 0o120777),
    "zip, bomb": lambda p: bomb(p / "a.zip"),
    "zip, damaged": lambda p: damaged(p / "a.zip"),
    "tar, steps up": lambda p: tar_of(p / "a.tar", ("good", b"1", tarfile.REGTYPE, ""), ("../evil", b"2", b"0", "")),
    "tar, link": lambda p: tar_of(p / "a.tar.gz", ("l", b"", tarfile.SYMTYPE, "/etc"), ("l/evil", b"2", b"0", "")),
    "tar, hard link": lambda p: tar_of(p / "a.tar", ("l", b"", tarfile.LNKTYPE, "/etc/passwd")),
    "tar, device": lambda p: tar_of(p / "a.tar", ("d", b"", tarfile.CHRTYPE, "")),
}


def bomb(path: Path) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("zeros", bytes(60_000_000))
    return path


def damaged(path: Path) -> Path:
    data = bytearray(zip_of(path, {"good": CONTENT}).read_bytes())
    data[5000] ^= 1
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_archives_leave_nothing(kind: str, tmp_path: Path) -> None:
    archive = HOSTILE[kind](tmp_path)
    with pytest.raises(DownloadError):
        unpack(archive, tmp_path / "in" / "side")
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}
    assert left == {archive.name, "in", "in/side"}


def test_archives_are_unpacked_beside_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "heads").mkdir()
    (tmp_path / "heads" / "mine.txt").write_text("stays")
    archive = zip_of(tmp_path / "a.zip", {"./heads/seq.txt": b"1", "heads/Thumbs.db": b"2"})
    assert unpack(archive, tmp_path) == ["heads/seq.txt"]
    assert sorted(path.name for path in (tmp_path / "heads").iterdir()) == ["mine.txt", "seq.txt"]
    tar = tar_of(tmp_path / "b.tar.gz", ("slice2/list.txt", b"3", tarfile.REGTYPE, ""))
    assert unpack(tar, tmp_path) == ["slice2/list.txt"]


@pytest.fixture
def heads(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Server:
    """The server as a mirror with a scene of 7-Scenes: an archive of archives."""
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as packed:
        packed.writestr("seq-01/frame-000000.pose.txt", "1 0 0 0\n")
    outer = zip_of(
        tmp_path / "outer.zip", {"heads/TrainSplit.txt": b"sequence2\n", "heads/seq-01.zip": inner.getvalue()}
    )
    asset = assets_of("7Scenes", parts=["heads"])[0]
    server.files["/" + asset.address.removeprefix("https://")] = outer.read_bytes()
    small = Asset(asset.address, asset.folder, part="heads", unpack=asset.unpack)
    monkeypatch.setitem(
        COLLECTIONS, "7Scenes", type(COLLECTIONS["7Scenes"])("text", "terms", "https://page", (small,))  # type: ignore[index]
    )  # fmt: skip
    return server


def test_command_downloads_unpacks_and_knows_what_is_there(
    heads: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["download", "--select", "7Scenes", "--scenes", "heads", "--data", str(tmp_path / "d"), "--mirror",
             heads.address]  # fmt: skip
    assert main(words) == 2
    assert "must be accepted" in capsys.readouterr().err
    assert heads.asked == []
    assert main([*words, "--accept-terms"]) == 0
    assert (tmp_path / "d/7Scenes/heads/seq-01/frame-000000.pose.txt").is_file()
    assert list((tmp_path / "d").rglob("*.zip")) == []
    count = len(heads.asked)
    assert main([*words, "--accept-terms"]) == 0
    assert "was there" in capsys.readouterr().out
    assert len(heads.asked) == count


def test_command_tells_failures_and_ends_with_1(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["download", "--select", "12Scenes", "--scenes", "apt1", "--data", str(tmp_path), "--accept-terms"]
    assert main([*words, "--mirror", server.address]) == 1
    assert "403" in capsys.readouterr().err


def test_list_and_dry_run_use_no_connection(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["download", "--list"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n{name} " in text for name in COLLECTIONS) and "CC BY-NC-SA 4.0" in text
    assert main(["download"]) == 2
    assert main(["download", "--select", *COLLECTIONS, "--training", "--CMU_slices", "2", "8", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("slice2.tar -> datasets/CMU/slice2.tar" in line for line in lines)
    assert any("checkpoints/ -> outputs/training (folder)" in line for line in lines)
    assert not any("slice3" in line for line in lines)


def test_selections(capsys: pytest.CaptureFixture[str]) -> None:
    assert {asset.part for asset in assets_of("CMU")} == {"2", "3", "4", "5", "6", *map(str, range(13, 22))}
    assert "8" in {asset.part for asset in assets_of("CMU", training=True)}
    assert {asset.part for asset in assets_of("CMU", parts=["8"])} == {"8"}
    with pytest.raises(DownloadError, match="no part 'cellar'"):
        assets_of("7Scenes", parts=["cellar"])
    with pytest.raises(DownloadError, match="--training"):
        assets_of("MegaDepth")


def test_every_address_is_complete_and_every_target_its_own() -> None:
    targets: list[tuple[str, str, str]] = []
    for collection in COLLECTIONS.values():
        assert collection.terms and collection.page.startswith("https://")
        for asset in collection.assets:
            assert asset.address.startswith("https://") and ".." not in asset.folder
            targets.append((asset.root, asset.folder, asset.name))
            assert len(asset.sha256) in (0, 64)
    assert len(targets) == len(set(targets))
    address = "https://a.org/x/y.zip?id=1"
    assert mirrored(address, "http://m:1/") == "http://m:1/a.org/x/y.zip?id=1"
    assert mirrored(address, "") == address
