"""List, read and write, on local files, on fsspec's memory file system and on a real S3 server."""

from pathlib import Path

import pytest

from pipelines.storage import StorageError, Store, UnsafeKey, check_key, open_url


@pytest.fixture(params=["local", "memory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return Store(str(tmp_path / "root"))
    if request.param == "memory":
        return Store(f"memory://{tmp_path.name}")
    return Store(f"{request.getfixturevalue('s3_url')}/{tmp_path.name}")


def test_what_was_written_is_listed_in_order_and_read(store: Store) -> None:
    written = {"b.png": b"1", "a/deep/er/c d.png": b"22", "a/ü%20#?.png": b"333", ".hidden.png": b""}
    for key, data in written.items():
        store.write(key, data)
    entries = list(store.list())
    assert [entry.key for entry in entries] == sorted(written)
    assert {entry.key: entry.size for entry in entries} == {key: len(data) for key, data in written.items()}
    assert {key: store.read(key) for key in written} == written
    assert all(store.key(store.url(key)) == key for key in written)


def test_writing_again_replaces_and_changes_the_fingerprint(store: Store) -> None:
    store.write("k", b"one")
    (before,) = store.list()
    store.write("k", b"three")
    (after,) = store.list()
    assert store.read("k") == b"three"
    assert before.fingerprint != after.fingerprint
    store.delete("k")
    assert not store.exists("k")


def test_what_is_not_there_is_said_clearly(store: Store) -> None:
    store.write("k", b"")
    with pytest.raises(FileNotFoundError):
        store.read("other")
    missing = Store(store.url() + "-nowhere")
    with pytest.raises(StorageError, match=r"nothing at .*-nowhere: check the path"):
        list(missing.list())


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
