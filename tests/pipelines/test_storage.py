"""List, read and write, on local files, on fsspec's memory file system and on a real S3 server."""

from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFile

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


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_bytes(b"x")
    with pytest.raises(StorageError, match="is a file: give the folder"):
        list(Store(str(tmp_path / "photo.png")).list())


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
