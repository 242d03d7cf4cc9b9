"""Containers read as folders, against files written by other libraries."""

import tarfile
from io import BytesIO
from multiprocessing import get_context
from pathlib import Path

import lmdb
import numpy as np
import pytest
import scipy.io

from nafnet.images import Picture, decode, encode
from pipelines.containers import block_key, open_collection, open_item
from pipelines.storage import StorageError, Store, UnsafeKey


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NAFNET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def png(seed: int) -> bytes:
    return encode(Picture(np.random.default_rng(seed).integers(0, 256, (6, 7, 3), np.uint8), "PNG"))


def make_lmdb(folder: Path, names: list[str], *, listed: bool = True) -> Path:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with lmdb.open(str(folder), map_size=2**20) as environment, environment.begin(write=True) as write:
        for i, name in enumerate(names):
            write.put(name.encode(), png(i))
    if listed:
        (folder / "meta_info.txt").write_text("".join(f"{name}.png (6,7,3) 1\n" for name in names))
    return folder


def make_tar(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, BytesIO(data))
    return path


def blocks(images: int = 2, seed: int = 0) -> np.ndarray:
    """Not the size of SIDD's, but of its order of axes: every value tells where it is."""
    return np.random.default_rng(seed).integers(0, 256, (images, 3, 10, 12, 3), np.uint8)


@pytest.mark.parametrize("listed", [True, False])
def test_lmdb(tmp_path: Path, listed: bool) -> None:
    folder = make_lmdb(tmp_path / "input.lmdb", ["b-000001", "a-000002"], listed=listed)
    collection = open_collection(str(folder))
    entries = list(collection.list())
    assert [entry.key for entry in entries] == ["a-000002.png", "b-000001.png"]
    assert [entry.size for entry in entries] == [len(png(1)), len(png(0))]
    assert collection.read("b-000001.png") == png(0)
    assert collection.key(collection.url("b-000001.png")) == "b-000001.png"
    with pytest.raises(FileNotFoundError, match=r"has no c\.png"):
        collection.read("c.png")


def test_what_meta_info_promises_and_the_file_lacks_is_missing(tmp_path: Path) -> None:
    folder = make_lmdb(tmp_path / "input.lmdb", ["a"])
    with (folder / "meta_info.txt").open("a") as file:
        file.write("gone.png (6,7,3) 1\n")
    collection = open_collection(str(folder))
    assert [entry.size for entry in collection.list()] == [len(png(0)), 0]
    with pytest.raises(FileNotFoundError):
        collection.read("gone.png")


@pytest.mark.parametrize("compressed", [True, False])
def test_matlab_blocks(tmp_path: Path, compressed: bool, cache: Path) -> None:
    array, name = blocks(), "ValidationNoisyBlocksSrgb"
    path = tmp_path / f"{name}.mat"
    scipy.io.savemat(path, {"note": "before", name: array}, do_compression=compressed)
    collection = open_collection(str(path))
    assert [entry.key for entry in collection.list()] == [block_key(i, j) for i in range(2) for j in range(3)]
    for image in range(2):
        for block in range(3):
            picture = decode(collection.read(block_key(image, block)))
            np.testing.assert_array_equal(picture.pixels, array[image, block])
            assert picture.format == "PNG"
    with pytest.raises(FileNotFoundError, match="no block"):
        collection.read("0002_00.png")
    assert len(list((cache / "containers").glob("*.npy"))) == 1


def test_slabs_of_columns_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.matlab._SLAB_BYTES", 2 * 3 * 10 * 5)  # of 12 columns: 5, 5 and 2
    array = blocks(seed=1)
    scipy.io.savemat(tmp_path / "a.mat", {"a": array}, do_compression=True)
    collection = open_collection(str(tmp_path / "a.mat"))
    np.testing.assert_array_equal(decode(collection.read("0001_02.png")).pixels, array[1, 2])


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "not a MATLAB v5 file"),
        (b"MATLAB 7.3 MAT-file".ljust(600), "save it as v7 or earlier"),
        (b"x" * 200, "not a MATLAB v5 file"),
    ],
)
def test_what_is_no_block_array_is_refused(tmp_path: Path, data: bytes, words: str) -> None:
    (tmp_path / "a.mat").write_bytes(data)
    with pytest.raises(StorageError, match=words):
        open_collection(str(tmp_path / "a.mat"))


def test_a_damaged_or_another_array_is_refused(tmp_path: Path, cache: Path) -> None:
    scipy.io.savemat(tmp_path / "other.mat", {"a": np.zeros((3, 4))})
    with pytest.raises(StorageError, match="no uint8 array of"):
        open_collection(str(tmp_path / "other.mat"))
    scipy.io.savemat(tmp_path / "whole.mat", {"a": blocks(20)}, do_compression=True)
    data = (tmp_path / "whole.mat").read_bytes()
    (tmp_path / "cut.mat").write_bytes(data[: len(data) // 2])
    with pytest.raises(StorageError, match="cut short or damaged: fetch it again"):
        open_collection(str(tmp_path / "cut.mat"))
    assert not list(cache.rglob("*.npy"))


def test_a_tar(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "a.tar", {"./x/1.png": png(1), "2.png": png(2), "empty.png": b""})
    collection = open_collection(str(path))
    assert {entry.key: entry.size for entry in collection.list()} == {
        "2.png": len(png(2)),
        "empty.png": 0,
        "x/1.png": len(png(1)),
    }
    assert collection.read("x/1.png") == png(1)
    fingerprints = {entry.fingerprint for entry in collection.list()}
    assert len(fingerprints) == 3
    with pytest.raises(FileNotFoundError):
        collection.read("3.png")
    make_tar(tmp_path / "packed.tar", {"1.png": png(1)}, "w:gz")
    with pytest.raises(StorageError, match="compressed ones cannot"):
        open_collection(str(tmp_path / "packed.tar"))


@pytest.mark.parametrize("pattern", ["s-{000..002}.tar", "s-*.tar"])
def test_shards(tmp_path: Path, pattern: str) -> None:
    for i in range(3):
        make_tar(tmp_path / f"s-{i:03d}.tar", {f"{i}.input.png": png(i), f"{i}.target.png": png(i + 10)})
    collection = open_collection(str(tmp_path / pattern))
    keys = [entry.key for entry in collection.list()]
    assert keys[:3] == ["s-000.tar/0.input.png", "s-000.tar/0.target.png", "s-001.tar/1.input.png"]
    assert collection.read(keys[3]) == png(11)
    assert collection.url() == str(tmp_path / pattern)  # which opens it again
    assert collection.key(collection.url(keys[3])) == keys[3]


def test_shards_that_are_not_there(tmp_path: Path) -> None:
    make_tar(tmp_path / "s-000.tar", {"0.png": png(0)})
    with pytest.raises(StorageError, match=r"lacks s-001\.tar, s-002\.tar"):
        open_collection(str(tmp_path / "s-{000..002}.tar"))
    with pytest.raises(StorageError, match="lacks t-"):
        open_collection(str(tmp_path / "t-*.tar"))


def test_items_are_found_by_their_url(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "a.png").write_bytes(png(5))
    (tmp_path / "folder.tar").mkdir()  # called so, and no tar
    (tmp_path / "folder.tar" / "b.png").write_bytes(png(6))
    make_tar(tmp_path / "s.tar", {"x/c.png": png(7)})
    make_lmdb(tmp_path / "i.lmdb", ["d"])
    for url, data in (
        ("plain/a.png", png(5)),
        ("folder.tar/b.png", png(6)),
        ("s.tar/x/c.png", png(7)),
        ("i.lmdb/d.png", png(0)),
    ):
        collection, key = open_item(str(tmp_path / url))
        assert collection.read(key) == data


def test_keys_stay_inside(tmp_path: Path) -> None:
    make_tar(tmp_path / "s.tar", {"a.png": png(0)})
    with pytest.raises(UnsafeKey):
        open_collection(str(tmp_path / "s.tar")).key("/etc/passwd")


def test_containers_in_a_bucket_are_copied_or_read_by_range(tmp_path: Path, s3_url: str, cache: Path) -> None:
    folder = make_lmdb(tmp_path / "i.lmdb", ["d"])
    scipy.io.savemat(tmp_path / "a.mat", {"a": blocks()}, do_compression=True)
    make_tar(tmp_path / "s.tar", {f"{i}.png": png(i) for i in range(30)})
    store = Store(f"{s3_url}/containers")
    for path in (folder / "data.mdb", folder / "meta_info.txt", tmp_path / "a.mat", tmp_path / "s.tar"):
        store.write(str(path.relative_to(tmp_path)), path.read_bytes())
    assert open_collection(f"{s3_url}/containers/i.lmdb").read("d.png") == png(0)
    block = decode(open_collection(f"{s3_url}/containers/a.mat").read("0001_01.png"))
    np.testing.assert_array_equal(block.pixels, blocks()[1, 1])
    shard = open_collection(f"{s3_url}/containers/s.tar")
    assert [shard.read(entry.key) for entry in shard.list()] == [png(int(entry.key[:-4])) for entry in shard.list()]
    assert sorted(path.suffix for path in (cache / "containers").iterdir() if path.suffix != ".lock") == [
        ".mdb",
        ".npy",
    ]


def _expanded(path: str) -> int:
    return len(list(open_collection(path).list()))


def test_processes_of_a_machine_expand_a_file_once(tmp_path: Path, cache: Path) -> None:
    scipy.io.savemat(tmp_path / "a.mat", {"a": blocks(40)}, do_compression=True)
    with get_context("spawn").Pool(2) as pool:
        assert pool.map(_expanded, [str(tmp_path / "a.mat")] * 2) == [120, 120]
    assert not list((cache / "containers").glob("*.part"))
    assert len(list((cache / "containers").glob("*.npy"))) == 1
