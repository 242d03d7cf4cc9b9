"""From what a person names to a file on this machine: caches, mirrors that fail in many ways, processes that die."""

import hashlib
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from nafnet import catalog
from nafnet.checkpoint import CheckpointError
from pipelines import retry, weights
from pipelines.storage import Store
from pipelines.weights import adopt_prefix, locate, own_prefix

NAME, FILE = "NAFNet-SIDD-width32", "NAFNet-SIDD-width32.pth"
BASELINE = "Baseline-GoPro-width32"
CHUNK = 10_000
DATA = bytes(range(100)) * 1000
OTHER = bytes(range(1, 101)) * 1000


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Mirror(ThreadingHTTPServer):
    """A file server that counts, cuts connections and holds them up."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), MirrorHandler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files: dict[str, bytes] = {}
        self.ranges = "bytes"  # or "none", which it says, or "ignored", which it does not say
        self.versions = True  # whether it sends ETags
        self.asked: list[str] = []  # one per GET
        self.sent = 0  # bytes of content
        self.cuts: list[int] = []  # the counts of sent bytes at which the connection breaks
        self.dies_at: int | None = None  # likewise, and every further GET is a 503
        self.holds_at: int | None = None  # the count of sent bytes at which it waits for `go`
        self.go = threading.Event()


class MirrorHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # it would add 40 ms to each answer
    server: Mirror

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(content=False)

    def do_GET(self) -> None:
        self.server.asked.append(f"{self.path} {self.headers.get('Range', 'whole')}")
        self._answer(content=True)

    def _answer(self, *, content: bool) -> None:
        mirror, data = self.server, self.server.files.get(self.path)
        if self.path.startswith("/signed/"):
            self._head(302, Location="/elsewhere?Signature=s3cret")
        elif mirror.dies_at is not None and mirror.sent >= mirror.dies_at:
            self._head(503)
        elif data is None:
            self._head(404)
        else:
            start, stop = 0, len(data)
            asked = self.headers.get("Range", "") if mirror.ranges == "bytes" else ""
            if asked:
                first, _, last = asked.removeprefix("bytes=").partition("-")
                start, stop = int(first), int(last) + 1
            fields = {"ETag": f'"{sha256(data)[:8]}"'} if mirror.versions else {}
            fields |= {} if mirror.ranges == "ignored" else {"Accept-Ranges": mirror.ranges}
            self._head(206 if asked else 200, stop - start, **fields)
            if content:
                self._send(data[start:stop])

    def _head(self, status: int, length: int = 0, **fields: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(length), **fields}.items():
            self.send_header(name, value)
        self.end_headers()

    def _send(self, data: bytes) -> None:
        mirror = self.server
        for start in range(0, len(data), 1000):
            if mirror.holds_at is not None and mirror.sent >= mirror.holds_at:
                mirror.go.wait(30)
            dead = mirror.dies_at is not None and mirror.sent >= mirror.dies_at
            if dead or (mirror.cuts and mirror.sent >= mirror.cuts[0]):
                del mirror.cuts[:1]
                self.close_connection = True
                return
            try:
                self.wfile.write(data[start : start + 1000])
            except ConnectionError:  # the other side was killed, or has enough
                self.close_connection = True
                return
            mirror.sent += len(data[start : start + 1000])


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Path:
    """An empty cache, one small published file, no place that has it, and what is logged."""
    monkeypatch.setenv("NAFNET_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("NAFNET_WEIGHTS", raising=False)
    monkeypatch.setattr(catalog, "MIRRORS", ())
    monkeypatch.setattr(weights, "_CHUNK_BYTES", CHUNK)
    monkeypatch.setattr(retry, "_FIRST_WAIT_SECONDS", 0.0)
    entry = replace(catalog.CATALOG[NAME], sha256=sha256(DATA), size=len(DATA))
    monkeypatch.setitem(catalog.CATALOG, NAME, entry)
    caplog.set_level(logging.INFO, "pipelines.weights")
    return tmp_path / "cache"


@pytest.fixture
def mirror(monkeypatch: pytest.MonkeyPatch) -> Iterator[Mirror]:
    """A server with two mirrors, /a and /b, of which the second has the file."""
    with Mirror() as server:
        server.files[f"/b/{FILE}"] = DATA
        monkeypatch.setattr(catalog, "MIRRORS", (f"{server.url}/a", f"{server.url}/b"))
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.go.set()
        server.shutdown()


def parts(cache: Path) -> list[int]:
    """The sizes of the parts that lie there."""
    return [path.stat().st_size for path in cache.glob(".*.part")]


def wait_for(happened: Callable[[], bool]) -> None:
    for _ in range(3000):
        if happened():
            return
        time.sleep(0.01)
    raise AssertionError("it did not happen in 30 s")


def test_the_bundled_weights_and_files_are_found_without_a_network(checkpoint_file: Path) -> None:
    assert locate("demo").name == "demo.safetensors"
    assert locate(str(checkpoint_file)) == checkpoint_file


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*nafnet-gopro.*NAFNet-GoPro-width32"):
        locate("nafnet-gopro")


# The cache


def test_a_cached_file_needs_nothing_else(cache: Path, mirror: Mirror) -> None:
    cache.mkdir()
    (cache / FILE).write_bytes(DATA)
    assert locate(NAME) == cache / FILE
    assert mirror.asked == []
    assert [path.name for path in cache.iterdir()] == [FILE]


@pytest.mark.parametrize("data", [OTHER, DATA[:-1]])
def test_a_cached_file_with_another_hash_is_neither_loaded_nor_deleted(
    cache: Path, mirror: Mirror, data: bytes
) -> None:
    cache.mkdir()
    (cache / FILE).write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        locate(NAME)
    told = str(caught.value)
    assert told.splitlines()[:3] == [
        f"{cache / FILE} is not the {NAME} it should be; it was not loaded",
        f"  its SHA-256: {sha256(data)} ({len(data)} bytes)",
        f"  expected:    {sha256(DATA)} (100000 bytes)",
    ]
    assert "Delete it or move it away" in told
    assert (cache / FILE).read_bytes() == data
    assert mirror.asked == []


def test_a_cache_that_cannot_be_written_is_named(cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    with pytest.raises(CheckpointError, match=rf"cannot write to the cache folder {cache} .*set NAFNET_CACHE"):
        locate(NAME)


# Places


@pytest.mark.parametrize("kind", ["folder", "file", "memory", "s3"])
def test_a_prefix_of_ones_own_comes_before_the_mirrors(
    kind: str,
    tmp_path: Path,
    cache: Path,
    mirror: Mirror,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    prefix = {"folder": f"{tmp_path}/own", "file": f"file://{tmp_path}/own/", "memory": "memory://"}.get(kind)
    if prefix is None:
        prefix = request.getfixturevalue("s3_url") + "/own"
    Store(prefix).write(FILE, DATA)
    monkeypatch.setenv("NAFNET_WEIGHTS", prefix)
    assert locate(NAME) == cache / FILE
    assert (cache / FILE).read_bytes() == DATA
    Store(prefix).delete(FILE)
    assert locate(NAME) == cache / FILE
    assert mirror.asked == []
    assert parts(cache) == []


def test_the_next_place_is_tried_when_one_lacks_the_file(
    tmp_path: Path, cache: Path, mirror: Mirror, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("NAFNET_WEIGHTS", str(tmp_path))
    assert locate(NAME).read_bytes() == DATA
    assert f"could not fetch {tmp_path}/{FILE}\n    FileNotFoundError" in caplog.text
    assert f"could not fetch {mirror.url}/a/{FILE}\n    ClientResponseError: 404" in caplog.text
    assert f"fetching {mirror.url}/b/{FILE} (0.1 MB)" in caplog.text
    progress = [line for line in caplog.messages if " %" in line]
    assert progress[0] == f"{FILE}: 0.0 of 0.1 MB, 20 %"
    assert progress[-1] == f"{FILE}: 0.1 of 0.1 MB, 100 %"
    assert len(progress) == 5


@pytest.mark.parametrize("wrong", [OTHER, DATA + b"more"])
def test_a_mirror_with_wrong_bytes_is_passed_over(
    cache: Path, mirror: Mirror, wrong: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    mirror.files[f"/a/{FILE}"] = wrong
    assert locate(NAME).read_bytes() == DATA
    assert (f"its SHA-256 there is {sha256(OTHER)}" if wrong == OTHER else "it has 100004 bytes there") in caplog.text
    assert parts(cache) == []


def test_without_any_place_the_error_says_what_was_tried_and_what_to_do(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = "http://127.0.0.1:1/models"
    monkeypatch.setattr(catalog, "MIRRORS", (nowhere,))
    monkeypatch.setenv("NAFNET_WEIGHTS", f"{tmp_path}/own")
    for name, expected in [(NAME, sha256(DATA)), (BASELINE, "none known")]:
        file = f"{name}.pth"
        with pytest.raises(CheckpointError) as caught:
            locate(name)
        lines = str(caught.value).splitlines()
        assert lines[0] == f"{file} is not on this machine and could not be fetched"
        assert lines[1] == f"  expected SHA-256: {expected}"
        assert lines[2] == f"  could not fetch {tmp_path}/own/{file}"
        assert lines[4] == f"  could not fetch {nowhere}/{file}"
        assert "Cannot connect to host 127.0.0.1:1" in lines[5] or "Connect call failed" in lines[5]
        assert lines[6:] == [
            "  Do one of these:",
            f"  - put it into the cache folder: {cache / file}",
            "  - set NAFNET_WEIGHTS to a folder or URL prefix that holds it",
            "  - give its path as --checkpoint",
        ]
    assert {path.suffix for path in cache.iterdir()} == {".lock"}


# Places of whoever planned the work


def test_what_is_passed_on_means_the_same_on_another_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert own_prefix() is None
    for own, passed_on in [
        ("own", f"{tmp_path}/own"),
        ("~/own", str(Path.home() / "own")),
        ("/shared/own", "/shared/own"),
        ("s3://bucket/own", "s3://bucket/own"),
        ("https://s3cret@host/own", None),
    ]:
        monkeypatch.setenv("NAFNET_WEIGHTS", own)
        assert own_prefix() == passed_on
    assert "other machines are not told of NAFNET_WEIGHTS" in caplog.text
    assert "s3cret" not in caplog.text


@pytest.mark.parametrize(
    ("own", "adopted", "used"),
    [("", "/theirs", "/theirs"), ("/mine", "/theirs", "/mine"), ("/mine", None, "/mine"), ("", None, "")],
)
def test_a_place_that_is_passed_on_counts_where_there_is_no_other(
    own: str, adopted: str | None, used: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NAFNET_WEIGHTS", own)
    adopt_prefix(adopted)
    assert os.environ["NAFNET_WEIGHTS"] == used


# Secrets


@pytest.mark.parametrize(
    "url",
    [
        "s3://KEY:s3cret@bucket/models",
        "https://s3cret@host/models",
        "https://host/models?token=s3cret",
        "s3://bucket/models?s3cret",
    ],
)
def test_urls_that_may_hold_secrets_are_refused_and_not_repeated(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NAFNET_WEIGHTS", url)
    for named in (NAME, url):
        with pytest.raises(CheckpointError, match=r"give it without") as caught:
            locate(named)
        assert "s3cret" not in str(caught.value)


def test_the_signature_of_a_redirect_is_not_repeated(mirror: Mirror, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(CheckpointError, match="404") as caught:
        locate(f"{mirror.url}/signed/net.pth")
    assert "s3cret" not in str(caught.value) + caplog.text


# Interruptions


def test_a_cut_connection_is_continued_at_once(cache: Path, mirror: Mirror) -> None:
    mirror.cuts = [45_000, 70_000]
    before = retry.total()
    assert locate(NAME).read_bytes() == DATA
    assert mirror.cuts == []
    assert mirror.sent <= len(DATA) + 2 * 2 * CHUNK
    assert retry.total() - before == 2
    assert parts(cache) == []


def test_what_has_arrived_is_kept_for_the_next_time_and_any_place(cache: Path, mirror: Mirror) -> None:
    mirror.dies_at = 45_000
    with pytest.raises(CheckpointError, match="503"):
        locate(NAME)
    (kept,) = parts(cache)
    assert 25_000 <= kept <= 45_000
    assert not (cache / FILE).exists()

    mirror.files[f"/a/{FILE}"] = mirror.files.pop(f"/b/{FILE}")
    mirror.dies_at, before = None, mirror.sent
    assert locate(NAME).read_bytes() == DATA
    wait_for(lambda: mirror.sent - before == len(DATA) - kept)  # a piece is counted after it was sent
    assert parts(cache) == []


def test_a_part_that_does_not_belong_to_the_file_is_given_up(cache: Path, mirror: Mirror) -> None:
    cache.mkdir()
    part = cache / f".{FILE}.{sha256(DATA)[:16]}.part"
    for left in (OTHER[:30_000], OTHER, OTHER + OTHER):
        part.write_bytes(left)
        assert locate(NAME).read_bytes() == DATA
        (cache / FILE).unlink()
    part.write_bytes(DATA)  # the process died before it could give the file its name
    before = mirror.sent
    assert locate(NAME).read_bytes() == DATA
    assert mirror.sent == before


@pytest.mark.parametrize("ranges", ["none", "ignored"])
def test_a_server_without_ranges_starts_anew(
    ranges: str, cache: Path, mirror: Mirror, caplog: pytest.LogCaptureFixture
) -> None:
    mirror.ranges = ranges
    cache.mkdir()
    part = cache / f".{FILE}.{sha256(DATA)[:16]}.part"
    part.write_bytes(DATA[:30_000])
    assert locate(NAME).read_bytes() == DATA
    assert "this server cannot continue a file" in caplog.text
    assert mirror.asked[-1] == f"/b/{FILE} whole"


def test_processes_of_a_node_fetch_a_file_once(cache: Path, mirror: Mirror, caplog: pytest.LogCaptureFixture) -> None:
    mirror.holds_at = 45_000
    with other_process(mirror) as process, ThreadPoolExecutor() as pool:
        wait_for(lambda: mirror.sent >= 45_000)
        located = pool.submit(locate, NAME)
        wait_for(lambda: "waiting for another process" in caplog.text)
        assert not (cache / FILE).exists()
        assert len(parts(cache)) == 1
        mirror.go.set()
        assert located.result() == cache / FILE
        assert process.communicate()[0].strip() == str(cache / FILE)
    wait_for(lambda: mirror.sent == len(DATA))


def test_after_a_killed_process_only_the_rest_is_fetched(cache: Path, mirror: Mirror) -> None:
    mirror.holds_at = 45_000
    with other_process(mirror) as process, ThreadPoolExecutor() as pool:
        wait_for(lambda: mirror.sent >= 45_000)
        before = len(mirror.asked)
        waiting = pool.submit(locate, NAME)
        process.kill()
        process.wait()
        (kept,) = parts(cache)
        assert kept >= 20_000
        assert not (cache / FILE).exists()
        mirror.go.set()
        assert waiting.result().read_bytes() == DATA
    ranges = [asked.partition("bytes=")[2] for asked in mirror.asked[before:] if "bytes=" in asked]
    starts = [int(asked.partition("-")[0]) for asked in ranges]
    assert starts[0] == kept
    assert starts == sorted(starts)


def other_process(mirror: Mirror) -> "subprocess.Popen[str]":
    """Another process that locates the published file on this server."""
    script = f"""
from dataclasses import replace
from nafnet import catalog
from pipelines import retry, weights
weights._CHUNK_BYTES = {CHUNK}
catalog.MIRRORS = {catalog.MIRRORS}
catalog.CATALOG[{NAME!r}] = replace(catalog.CATALOG[{NAME!r}], sha256={sha256(DATA)!r}, size={len(DATA)})
print(weights.locate({NAME!r}))
"""
    return subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)


# URLs


def test_a_url_is_fetched_once(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "net.pth").write_bytes(b"tensors")
    url = f"file://{tmp_path}/net.pth"
    fetched = locate(url)
    assert fetched.parent == cache
    assert fetched.read_bytes() == b"tensors"
    (tmp_path / "net.pth").unlink()
    assert locate(url) == fetched


@pytest.mark.parametrize("after", ["same", "changed", "no versions"])
def test_a_url_is_continued_only_while_its_content_is_the_same(after: str, cache: Path, mirror: Mirror) -> None:
    mirror.files["/net.pth"] = DATA
    mirror.versions = after != "no versions"
    mirror.dies_at = 45_000
    with pytest.raises(CheckpointError, match=rf"could not fetch {mirror.url}/net.pth\n .*503"):
        locate(f"{mirror.url}/net.pth")
    (kept,) = parts(cache)
    mirror.files["/net.pth"] = OTHER if after == "changed" else DATA
    mirror.dies_at, before = None, mirror.sent
    assert locate(f"{mirror.url}/net.pth").read_bytes() == mirror.files["/net.pth"]
    wait_for(lambda: mirror.sent - before == len(DATA) - (kept if after == "same" else 0))
    assert parts(cache) == []


def test_a_url_that_changes_while_it_is_read_is_refused(cache: Path, mirror: Mirror) -> None:
    url = f"{mirror.url}/net.pth"
    mirror.files["/net.pth"], mirror.holds_at = DATA, 45_000
    with ThreadPoolExecutor() as pool:
        located = pool.submit(locate, url)
        wait_for(lambda: mirror.sent >= 45_000)
        mirror.files["/net.pth"] = OTHER
        mirror.go.set()
        with pytest.raises(CheckpointError, match="it changed while it was read"):
            located.result()
    assert parts(cache) == []
    assert locate(url).read_bytes() == OTHER


# Baseline files, whose hashes nobody publishes


def test_the_hash_of_a_first_use_is_recorded_and_held_to(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    own = Store(f"{tmp_path}/own")
    own.write(f"{BASELINE}.pth", DATA)
    monkeypatch.setenv("NAFNET_WEIGHTS", f"{tmp_path}/own")
    target = cache / f"{BASELINE}.pth"
    assert locate(BASELINE) == target
    assert f"recorded SHA-256 {sha256(DATA)} in {cache / 'hashes.json'}" in caplog.text
    assert json.loads((cache / "hashes.json").read_text()) == {BASELINE: sha256(DATA)}
    caplog.clear()
    assert locate(BASELINE) == target
    assert caplog.text == ""

    target.write_bytes(OTHER)
    with pytest.raises(CheckpointError, match=rf"expected: +{sha256(DATA)}\n(.*\n)*.*remove {BASELINE} from .*hashes"):
        locate(BASELINE)
    assert target.read_bytes() == OTHER
    target.unlink()
    own.write(f"{BASELINE}.pth", OTHER)
    with pytest.raises(CheckpointError, match=rf"its SHA-256 there is {sha256(OTHER)}, expected {sha256(DATA)}"):
        locate(BASELINE)
    assert not target.exists()
    own.write(f"{BASELINE}.pth", DATA)
    assert locate(BASELINE).read_bytes() == DATA


def test_a_file_put_into_the_cache_is_recorded_beside_the_others(cache: Path) -> None:
    cache.mkdir()
    (cache / "hashes.json").write_text(json.dumps({"Baseline-SIDD-width64": "ab"}))
    (cache / f"{BASELINE}.pth").write_bytes(DATA)
    locate(BASELINE)
    recorded = {"Baseline-SIDD-width64": "ab", BASELINE: sha256(DATA)}
    assert json.loads((cache / "hashes.json").read_text()) == recorded


@pytest.mark.parametrize("text", ['{"Baseline', "[]"])
def test_a_damaged_record_is_named(cache: Path, text: str) -> None:
    cache.mkdir()
    (cache / "hashes.json").write_text(text)
    (cache / f"{BASELINE}.pth").write_bytes(DATA)
    with pytest.raises(CheckpointError, match=r"hashes\.json is .*mend or delete it"):
        locate(BASELINE)
    assert (cache / "hashes.json").read_text() == text
