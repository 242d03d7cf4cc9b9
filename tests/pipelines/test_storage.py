"""List, read and write, on local files, on fsspec's memory file system and on real S3 servers."""

import http.server
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFile

from pipelines import retry
from pipelines.listing import read_listing
from pipelines.retry import GaveUp, counted
from pipelines.storage import StorageError, Store, UnsafeKey, check_key, in_force, open_url, use
from pipelines.storage_options import StorageOptions, load
from tests.faults import FaultProxy
from tests.pipelines.conftest import KEY, SECRET


def what_was_written_is_listed_in_order_and_read(store: Store) -> None:
    written = {"b.png": b"1", "a/deep/er/c d.png": b"22", "a/ü%20#?.png": b"333", ".hidden.png": b"", "a!.png": b"4"}
    for key, data in written.items():
        store.write(key, data)
    entries = list(store.list())
    assert [entry.key for entry in entries] == sorted(written)
    assert {entry.key: entry.size for entry in entries} == {key: len(data) for key, data in written.items()}
    assert {key: store.read(key) for key in written} == written
    if store.fs.protocol != "memory":  # which says its times in two ways
        assert [store.entry(entry.key) for entry in entries] == entries
    assert all(store.key(store.url(key)) == key for key in written)


def parts_and_streams_are_read(store: Store) -> None:
    store.write("k", bytes(range(100)))
    assert store.read("k", 10, 20) == bytes(range(10, 20))
    assert store.read("k", 90, 200) == bytes(range(90, 100))
    assert store.read("k", size=100) == bytes(range(100))
    with store.open("k", block_bytes=16) as file:
        file.seek(50)
        assert file.read(20) == bytes(range(50, 70))


def writing_again_replaces_and_changes_the_fingerprint(store: Store) -> None:
    store.write("k", b"one")
    (before,) = store.list()
    store.write("k", b"three")
    (after,) = store.list()
    assert store.read("k") == b"three"
    assert before.fingerprint != after.fingerprint
    store.delete("k")
    assert not store.exists("k")


def what_is_not_there_is_said_clearly(store: Store) -> None:
    store.write("k", b"")
    with pytest.raises(FileNotFoundError):
        store.read("other")
    assert store.entry("other") is None
    missing = Store(store.url() + "-nowhere")
    with pytest.raises(StorageError, match=r"nothing at .*-nowhere: check the path"):
        list(missing.list())
    with pytest.raises(StorageError, match="is a file: give the folder"):
        list(Store(store.url("k")).list())


def a_probe_leaves_nothing(store: Store) -> None:
    store.write("k", b"x")
    store.check_writable()
    store.check_readable(["nothing here", "k"])
    assert [entry.key for entry in store.list()] == ["k"]


def folders_of_every_depth_come_in_order(store: Store) -> None:
    dice = random.Random(4)  # noqa: S311
    parts = ["a", "a-", "a.b", "b", "B", "ä", "é", "z", "0"]
    keys = {"/".join(dice.choices(parts, k=dice.randint(1, 4))) + f"/{dice.randint(0, 9)}.png" for _ in range(120)}
    for key in keys:
        store.write(key, b"x")
    assert [entry.key for entry in store.list()] == sorted(keys)


EVERYWHERE = (
    what_was_written_is_listed_in_order_and_read,
    parts_and_streams_are_read,
    writing_again_replaces_and_changes_the_fingerprint,
    what_is_not_there_is_said_clearly,
    a_probe_leaves_nothing,
    folders_of_every_depth_come_in_order,
)


@pytest.fixture(params=["local", "memory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return Store(str(tmp_path / "root"))
    if request.param == "memory":
        return Store(f"memory://{tmp_path.name}")
    return Store(f"{request.getfixturevalue('s3_url')}/{tmp_path.name}")


@pytest.mark.parametrize("holds", EVERYWHERE)
def test_everywhere(holds: Callable[[Store], None], store: Store) -> None:
    holds(store)


def test_on_ceph(ceph_endpoint: str) -> None:
    """In one test, so that its cluster is started once."""
    options = {"endpoint_url": ceph_endpoint, "key": KEY, "secret": SECRET, "client_kwargs": {"region_name": "default"}}
    use(StorageOptions.parse("test", {"s3://": options}))
    Store("s3://bucket").fs.mkdir("bucket")
    for holds in EVERYWHERE:
        holds(Store(f"s3://bucket/{holds.__name__}"))
    store = Store("s3://bucket/pages")
    store.fs.pipe_file("bucket/pages/a//b.png", b"1")
    store.fs.pipe_file("bucket/pages/a/b.png", b"22")
    assert [(entry.key, entry.size) for entry in store.list()] == [("a//b.png", 1), ("a/b.png", 2)]
    with pytest.raises(StorageError, match="there is no such bucket"):
        list(Store("s3://nobucket/x").list())
    use(StorageOptions.parse("test", {"s3://": {**options, "secret": "wrong"}}))
    with pytest.raises(StorageError, match=r"the credentials are refused \(SignatureDoesNotMatch\)"):
        list(Store("s3://bucket/pages").list())
    use(StorageOptions.parse("test", {"s3://": {"endpoint_url": ceph_endpoint, "anon": True}}))
    with pytest.raises(StorageError, match=r"access is denied"):
        Store("s3://bucket/pages").check_writable()


def test_a_failed_local_write_leaves_the_old_content_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(str(tmp_path))
    store.write("k", b"old")

    def broken(self: Path, target: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", broken)
    with pytest.raises(OSError, match="disk full"):
        store.write("k", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["k"]
    assert (tmp_path / "k").read_bytes() == b"old"


def test_linked_folders_are_entered_and_loops_end(tmp_path: Path) -> None:
    (tmp_path / "root" / "a").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "1.png").write_bytes(b"x")
    (tmp_path / "root" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root" / "a" / "loop").symlink_to(tmp_path / "root")
    (tmp_path / "root" / "gone.png").symlink_to(tmp_path / "nothing")
    assert [entry.key for entry in Store(str(tmp_path / "root")).list()] == ["gone.png", "linked/1.png"]


def test_keys_that_only_look_alike_stay_apart() -> None:
    store = Store("memory://alike")
    for path in ("/alike/a//b.png", "/alike/a/b.png"):  # past the file system's own tidying, as an S3 client may do
        store.fs.store[path] = MemoryFile(store.fs, path, b"x")
    assert [entry.key for entry in store.list()] == ["a//b.png", "a/b.png"]


def test_the_longest_names_can_be_written(tmp_path: Path) -> None:
    name = "\N{CJK UNIFIED IDEOGRAPH-4E00}" * 80 + ".png"  # 244 of the 255 bytes that a name may have
    store = Store(str(tmp_path))
    store.write(name, b"x")
    assert store.read(name) == b"x"


@pytest.mark.parametrize("key", ["", "/etc/passwd", "../up", "a/../../up", "a//b", "./a", "a/.", "nul\0", "a\\b"])
def test_keys_cannot_leave_their_prefix(key: str, tmp_path: Path) -> None:
    with pytest.raises(UnsafeKey):
        check_key(key)
    with pytest.raises(UnsafeKey):
        Store(str(tmp_path / "inner")).write(key, b"")


def test_unknown_protocols_are_named() -> None:
    with pytest.raises(StorageError, match="nosuch://here"):
        Store("nosuch://here")


def test_open_url_splits_off_the_name(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"x")
    store, name = open_url(f"{tmp_path}/a.txt")
    assert (store.read(name), name) == (b"x", "a.txt")


def test_a_link_to_a_folder_inside_adds_nothing_whatever_its_name(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "1.png").write_bytes(b"x")
    (tmp_path / "another name").symlink_to(tmp_path / "real")
    assert [entry.key for entry in Store(str(tmp_path)).list()] == ["real/1.png"]


def test_a_tree_deeper_than_python_recurses(tmp_path: Path) -> None:
    store = Store(f"memory://{tmp_path.name}")
    key = "/".join(["d"] * 1200) + "/x.png"
    store.fs.store[f"/{tmp_path.name}/{key}"] = MemoryFile(store.fs, key, b"x")
    assert [entry.key for entry in store.list()] == [key]


def test_pages_of_s3_follow_one_another(s3_url: str, s3_folder: Path, tmp_path: Path) -> None:
    folder = s3_folder / "bucket" / tmp_path.name
    folder.mkdir()
    names = [f"{i:04d}.png" for i in range(2100)]
    for name in names:
        (folder / name).write_bytes(b"")
    time.sleep(1.5)  # the server looks into its folders once a second
    assert [entry.key for entry in Store(f"{s3_url}/{tmp_path.name}").list()] == names


def test_a_listing_that_is_left_early_asks_for_little_more(tmp_path: Path) -> None:
    asked: list[str] = []

    class Watched(LocalFileSystem):
        protocol = "watched"
        cachable = False

        def ls(self, path: str, detail: bool = False, **kwargs: object) -> object:
            asked.append(path)
            return super().ls(path, detail=detail, **kwargs)

    fsspec.register_implementation("watched", Watched, clobber=True)
    for i in range(100):
        (tmp_path / f"{i:02d}").mkdir()
        (tmp_path / f"{i:02d}" / "x.png").write_bytes(b"")
    store = Store(str(tmp_path))
    store.fs, store.is_local = Watched(), False
    assert next(store.list()).key == "00/x.png"
    assert len(asked) <= 12


def test_missing_buckets_and_wrong_keys_are_said_at_once(s3_url: str, s3_address: str) -> None:
    with counted() as count:
        with pytest.raises(StorageError, match="there is no such bucket: check its name"):
            list(Store("s3://nobucket/x").list())
        with pytest.raises(StorageError, match="there is no such bucket"):
            Store("s3://nobucket/x").check_writable()
        use(
            StorageOptions.parse(
                "test", {"s3://": {"endpoint_url": f"http://{s3_address}", "key": KEY, "secret": "no"}}
            )
        )
        for ask in (lambda store: list(store.list()), lambda store: store.check_writable()):
            with pytest.raises(StorageError, match=r"SignatureDoesNotMatch.*: check.*AWS_ACCESS_KEY_ID"):
                ask(Store(f"{s3_url}/x"))
    assert count.retries == 0


@pytest.fixture
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "_FIRST_WAIT_SECONDS", 0.01)
    monkeypatch.setattr(retry, "_LONGEST_WAIT_SECONDS", 0.05)
    monkeypatch.setattr(retry, "_ATTEMPTS", 100)  # as many as the short waits need until the fault is over


@pytest.mark.parametrize("fault", ["drop", "lose", "slow_down", "too_many", "cut"])
def test_faults_are_waited_out_and_counted(
    fault: str, s3_url: str, s3_address: str, tmp_path: Path, quick_retries: None
) -> None:
    with FaultProxy(s3_address, faults=(fault,), rate=0) as proxy:  # type: ignore[arg-type]
        use(StorageOptions.parse("test", {"s3://": {"endpoint_url": proxy.url}}))
        store = Store(f"{s3_url}/{tmp_path.name}")
        store.write("k", b"0123456789")
        for ask in (
            lambda: store.write("k", b"0123456789"),
            lambda: store.read("k"),
            lambda: store.read("k", 2, 5),
            lambda: list(store.list()),
            lambda: store.entry("k"),
            lambda: store.delete("k"),
        ):
            proxy.next = 2
            with counted() as count:
                ask()
            bodyless = fault == "cut"  # what has no body cannot be cut
            assert count.retries > 0 or bodyless
            proxy.next = 0
        assert retry.total() > 0


def test_what_never_works_ends_with_how_often_it_was_tried(
    s3_url: str, s3_address: str, quick_retries: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "_ATTEMPTS", 3)
    with FaultProxy(s3_address, faults=("slow_down",), rate=1) as proxy:
        use(StorageOptions.parse("test", {"s3://": {"endpoint_url": proxy.url}}))
        store = Store(f"{s3_url}/x")
        with pytest.raises(GaveUp, match=r"cannot read bucket/x/k: gave up after 3 attempts in \d+ s: .*reduce your"):
            store.read("k")
        assert proxy.counts["slow_down"] == 3  # and no attempts of s3fs or botocore between them
        with pytest.raises(StorageError, match=r"gave up after 3 attempts.*check the network and the endpoint"):
            list(store.list())


def test_an_answer_that_is_shorter_than_listed_is_asked_for_again(
    tmp_path: Path, quick_retries: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(f"memory://{tmp_path.name}")
    store.write("k", b"0123456789")
    whole, asked = store.fs.cat_file, iter([b"0123", b"01"])
    monkeypatch.setattr(store.fs, "cat_file", lambda *args, **given: next(asked, None) or whole(*args, **given))
    with counted() as count:
        assert store.read("k", size=10) == b"0123456789"
    assert count.retries == 2
    store.write("k", b"changed")
    assert store.read("k", size=10) == b"changed"  # shorter since it was listed


_FORK = """
import os, sys
from pipelines.storage import Store
url = sys.argv[1]
Store(url).write("k", b"x")
if not (pid := os.fork()):
    os._exit(Store(url).read("k") != b"x")
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


def test_a_forked_process_makes_its_own_connections(s3_url: str, tmp_path: Path) -> None:
    """In a process of its own: a fork of this one, with the threads of other tests, may not even reach the child."""
    command = [sys.executable, "-c", _FORK, f"{s3_url}/{tmp_path.name}"]
    assert subprocess.run(command, timeout=60, check=False).returncode == 0


TABLE = {"s3://": {"secret": SECRET, "anon": False}, "s3://public": {"anon": True}, "s3://public/but/not": {"key": "K"}}


def test_the_longest_prefix_counts_and_nothing_of_it_is_printed() -> None:
    options = StorageOptions.parse("env:X", json.dumps(TABLE))
    assert options.of("s3://public/a") == options.of("s3://public") == {"anon": True}
    assert options.of("s3://public/but/not/b") == {"key": "K"}
    assert options.of("s3://publicity/a") == TABLE["s3://"]
    assert options.of("/local") == options.of("gs://x") == {}
    assert SECRET not in f"{options!r} {options} {[options]}"
    assert "env:X" in repr(options)


def test_options_come_from_the_environment_and_from_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_STORAGE", json.dumps(TABLE))
    (tmp_path / "s.json").write_text(json.dumps(TABLE))
    (tmp_path / "s.toml").write_text('["s3://"]\nsecret = "x"\nclient_kwargs = { region_name = "r" }\n')
    assert load("env:MY_STORAGE").of("s3://a") == TABLE["s3://"]
    assert load(f"file:{tmp_path}/s.json").of("s3://a") == TABLE["s3://"]
    assert load(f"file:{tmp_path}/s.toml").of("s3://a") == {"secret": "x", "client_kwargs": {"region_name": "r"}}
    assert load(None).of("s3://a") == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (f'{{"s3://": {{"secret": "{SECRET}",}}}}', "storage env:BAD is not JSON: see line 1"),
        (f'["{SECRET}"]', "a table of URL prefixes is needed"),
        (f'{{"{SECRET}": {{}}}}', "an entry's name is no URL prefix"),
        (f'{{"s3://": "{SECRET}"}}', "s3:// needs a table of options"),
    ],
)
def test_wrong_options_are_explained_without_their_values(
    content: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BAD", content)
    with pytest.raises(ValueError, match=message) as caught:
        load("env:BAD")
    assert SECRET not in str(caught.value)
    with pytest.raises(ValueError, match="the environment has no NOT_THERE"):
        load("env:NOT_THERE")


@pytest.mark.parametrize(("url", "package"), [("gs://bucket", "gcsfs"), ("az://bucket", "adlfs")])
def test_a_file_system_that_is_not_installed_is_named(url: str, package: str) -> None:
    with pytest.raises(StorageError, match=package):
        Store(url)
    with pytest.raises(StorageError, match=f"storage test: cannot use .*{package}"):
        use(StorageOptions.parse("test", {url: {}}))
    with pytest.raises(StorageError, match="cannot use nosuch://"):
        use(StorageOptions.parse("test", {"nosuch://": {}}))
    assert in_force() == StorageOptions()


def test_s3_options_reach_the_client_beside_our_own(s3_address: str) -> None:
    given = {"endpoint_url": f"http://{s3_address}", "config_kwargs": {"connect_timeout": 3}}
    use(StorageOptions.parse("test", {"s3://": given}))
    fs = Store("s3://bucket").fs
    assert fs.config_kwargs["connect_timeout"] == 3
    assert fs.config_kwargs["max_pool_connections"] == 32


def everything_asked_of(url: str, options: dict[str, Any]) -> Store:
    """The store at `url` under these options, after one request of each kind."""
    use(StorageOptions.parse("test", {"s3://": options}))
    store = Store(url)
    store.write("k", b"0123456789")
    assert (store.read("k"), store.read("k", 2, 5)) == (b"0123456789", b"234")
    with store.open("k", block_bytes=4) as file:
        assert file.read() == b"0123456789"
    assert [entry.key for entry in store.list()] == ["k"]
    assert store.entry("k") is not None
    return store


def test_requests_that_pay_say_so_and_name_their_region(s3_url: str, s3_address: str, tmp_path: Path) -> None:
    with FaultProxy(s3_address, rate=0) as proxy:
        options = {"endpoint_url": proxy.url, "requester_pays": True, "client_kwargs": {"region_name": "eu-1"}}
        everything_asked_of(f"{s3_url}/{tmp_path.name}", options)
    assert len(proxy.heads) >= 6
    for head in proxy.heads:
        assert "/eu-1/s3/aws4_request" in head
        assert "x-amz-request-payer: requester" in head, head


def test_a_profile_gives_keys_endpoint_and_region(
    s3_url: str, s3_address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    with FaultProxy(s3_address, rate=0) as proxy:
        config = f"region = eu-1\nendpoint_url = {proxy.url}\nresponse_checksum_validation = when_required\n"
        (tmp_path / "config").write_text(f"[profile lab]\n{config}")
        (tmp_path / "credentials").write_text(f"[lab]\naws_access_key_id = {KEY}\naws_secret_access_key = {SECRET}\n")
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
        everything_asked_of(f"{s3_url}/{tmp_path.name}", {"profile": "lab"})
    assert proxy.heads
    assert all(f"Credential={KEY}/" in head and "/eu-1/s3/" in head for head in proxy.heads)


def test_anonymous_requests_are_not_signed(s3_url: str, s3_address: str, tmp_path: Path) -> None:
    store = Store(f"{s3_url}/{tmp_path.name}")
    store.write("k", b"x")
    with FaultProxy(s3_address, rate=0) as proxy:
        use(StorageOptions.parse("test", {"s3://": {"endpoint_url": proxy.url, "anon": True}}))
        with pytest.raises(OSError, match="UnsupportedAlgorithm"):  # of this server; a public bucket would answer
            Store(store.url()).read("k")
    assert proxy.heads
    assert not [head for head in proxy.heads if "authorization" in head.lower()]


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """A plain web server on the folder "web"."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    (tmp_path / "web").mkdir()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path / "web")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_list_of_web_addresses(web: str, tmp_path: Path) -> None:
    (tmp_path / "web" / "a").mkdir()
    (tmp_path / "web" / "a" / "1.png").write_bytes(b"one")
    sources = [f"{web}/a/1.png", f"{web}/a/gone.png"]
    pq.write_table(pa.table({"source": sources}), tmp_path / "list.parquet")
    (tmp_path / "list.csv").write_text("source\n" + "\n".join(sources) + "\n")
    (tmp_path / "list.jsonl").write_text("".join(json.dumps({"source": url}) + "\n" for url in sources))
    for name in ("list.parquet", "list.csv", "list.jsonl"):
        listing = read_listing(str(tmp_path / name))
        assert listing.source == f"{web}/a"
        assert listing.rows.select(["key", "size"]).to_pydict() == {"key": ["1.png", "gone.png"], "size": [3, 0]}
        store = Store(listing.source)
        assert store.read("1.png", size=3) == b"one"
        with pytest.raises(FileNotFoundError):
            store.read("gone.png")
    with pytest.raises(StorageError, match="a web server lists nothing: give a"):
        list(store.list())
