"""Many images in one file, read as if it were a folder: LMDB, MATLAB block arrays, tar shards.

Each is a `Collection`, as a `Store` is: keys lie below the container's own name. What can only be read on a local disk
is copied into the cache first, once for all processes of a machine.
"""

import fcntl
import hashlib
import os
import posixpath
import re
import tarfile
import threading
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import lmdb

from nafnet.images import Picture, encode
from pipelines.cache import cache_folder
from pipelines.matlab import Blocks, expand
from pipelines.storage import Entry, StorageError, Store, in_force
from pipelines.storage_options import StorageOptions

_ITEM = re.compile(r"(?P<container>.*?\.(?:lmdb|mat|tar))/(?P<key>.+)")
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_COPY_BYTES = 2**24  # moved at once
_HEADER_BYTES = 2**16  # of a remote tar, fetched at once to read its headers


class Collection(Protocol):
    """What images are read from: a folder (`Store`) or a container."""

    def url(self, key: str = "") -> str:
        """Where `key` is: for people, for rows, and for `open_item`."""

    def key(self, url: str) -> str:
        """The inverse of `url`. Raises UnsafeKey for a URL that is not in it."""

    def list(self) -> Iterator[Entry]:
        """Every item, sorted by key. Raises StorageError for a place that cannot be listed."""

    def read(self, key: str) -> bytes:
        """An item as the bytes of an image file. Raises FileNotFoundError when it is not there."""


def open_collection(url: str) -> Collection:
    """The collection at `url`, opened once per process.

    Names that end in .lmdb, .mat or .tar are containers, and those of shards may hold a range or a star, as in
    gopro-{000000..000023}.tar; anything else is a folder.

    Raises:
        StorageError: it cannot be opened, or is a container of another kind than its name says.
    """
    with _OPENING:  # an LMDB file must not be opened twice
        return _open(url, os.getpid(), in_force())


_OPENING = threading.Lock()


@lru_cache(maxsize=64)
def _open(url: str, _process: int, _options: StorageOptions) -> Collection:
    """For each process its own: neither an LMDB environment nor s3fs survives a fork."""
    store = Store(url)
    ending = posixpath.splitext(store.root)[1].lower()
    if ending == ".tar" and ("*" in url or _RANGE.search(url)):
        return Shards(url)
    if ending == ".lmdb" and store.exists("data.mdb"):
        return Lmdb(store)
    if ending in {".mat", ".tar"} and not store.is_folder():
        home, _, name = store.url().rpartition("/")
        return (MatBlocks if ending == ".mat" else Tar)(Store(home or "/"), name)
    return store


def open_item(url: str) -> tuple[Collection, str]:
    """The collection that the item at `url` lies in, and its key there."""
    if found := _ITEM.fullmatch(url):
        collection = open_collection(found["container"])
        if not isinstance(collection, Store):
            return collection, found["key"]
    folder, _, name = url.rpartition("/")
    return Store(folder or "/"), name


class _Container:
    """What containers share: they lie in a store, under a name, and their items below that."""

    def __init__(self, home: Store, name: str) -> None:
        self._home, self._name = home, name

    def url(self, key: str = "") -> str:
        return self._home.url(f"{self._name}/{key}" if key else self._name)

    def key(self, url: str) -> str:
        return self._home.key(url).removeprefix(f"{self._name}/")

    def _entry(self) -> Entry:
        entry = self._home.entry(self._name)
        if entry is None:
            raise StorageError(f"nothing at {self.url()}: check the path, the bucket and the credentials")
        return entry


class Lmdb:
    """The authors' LMDB folders: PNG bytes under names that meta_info.txt lists, one `name.png (h,w,c) level` a line.

    Without meta_info.txt all keys count. The items are called name.png.
    """

    def __init__(self, store: Store) -> None:
        """Open the folder, which holds data.mdb; a remote one is copied into the cache first."""
        self._store = store
        entry = store.entry("data.mdb")
        if entry is None:
            raise StorageError(f"no data.mdb in {store.url()}: an LMDB folder holds one")
        self._fingerprint = entry.fingerprint
        path = _local_copy(store, entry)
        try:
            self._environment = lmdb.open(str(path), subdir=False, readonly=True, lock=False, readahead=False)
        except lmdb.Error as error:
            raise StorageError(f"{store.url()} is no LMDB that can be read: {error}") from error

    def url(self, key: str = "") -> str:
        return self._store.url(key)

    def key(self, url: str) -> str:
        return self._store.key(url)

    def list(self) -> Iterator[Entry]:
        if self._store.exists("meta_info.txt"):
            lines = self._store.read("meta_info.txt").decode().splitlines()
            names = [line.split(" ")[0] for line in lines if line.strip()]
        else:
            with self._environment.begin() as view:
                names = [f"{bytes(name).decode()}.png" for name in view.cursor().iternext(values=False)]
        with self._environment.begin(buffers=True) as view:
            for name in sorted(names):
                value = view.get(_stem(name))
                yield Entry(name, 0 if value is None else len(value), self._fingerprint)

    def read(self, key: str) -> bytes:
        with self._environment.begin() as view:
            value = view.get(_stem(key))
        if value is None:
            raise FileNotFoundError(f"{self.url()} has no {key}")
        return bytes(value)


class MatBlocks(_Container):
    """SIDD's block arrays: uint8 (images, blocks, height, width, 3) in a MATLAB file.

    A block is called IIII_BB.png, its image and its place in the image from zero, and is read as a PNG file.
    """

    def __init__(self, home: Store, name: str) -> None:
        """Expand the array into the cache, where single blocks can be read; that is done once."""
        super().__init__(home, name)
        self._fingerprint = self._entry().fingerprint
        target = _cached(self.url(), self._fingerprint, ".npy")
        with _held(target):
            if not target.exists():
                part = target.with_suffix(".part")
                with home.open(name) as file:
                    expand(file, part, self.url())
                part.replace(target)
        self._blocks = Blocks(target)

    def list(self) -> Iterator[Entry]:
        images, blocks = self._blocks.shape[:2]
        for image in range(images):
            for block in range(blocks):
                yield Entry(block_key(image, block), self._blocks.bytes, self._fingerprint)

    def read(self, key: str) -> bytes:
        image, block = (int(part) for part in _stem(key).split(b"_"))
        return encode(Picture(self._blocks[image, block], "PNG"))


def block_key(image: int, block: int) -> str:
    """What a block is called: image 7, block 21 is 0007_21.png."""
    return f"{image:04d}_{block:02d}.png"


class Tar(_Container):
    """A tar file, such as a shard of a WebDataset. Its headers are read once per process, its members by range."""

    def __init__(self, home: Store, name: str) -> None:
        super().__init__(home, name)
        self._fingerprint = self._entry().fingerprint
        self._members: dict[str, tuple[int, int]] = {}  # of members of one name the last counts, as tar extracts them
        try:
            with home.open(name, block_bytes=_HEADER_BYTES) as file, tarfile.open(fileobj=file, mode="r:") as archive:
                for member in archive:
                    if member.isreg():
                        self._members[member.name.removeprefix("./")] = member.offset_data, member.size
        except tarfile.TarError as error:
            raise StorageError(f"{self.url()} is no tar that can be read ({error}): compressed ones cannot") from error

    def list(self) -> Iterator[Entry]:
        for name in sorted(self._members):
            yield Entry(name, self._members[name][1], f"{self._fingerprint}@{self._members[name][0]}")

    def read(self, key: str) -> bytes:
        if key not in self._members:
            raise FileNotFoundError(f"{self.url()} has no {key}")
        start, size = self._members[key]
        return self._home.read(self._name, start, start + size)


class Shards:
    """Several tar files as one collection; keys begin with the name of their file."""

    def __init__(self, pattern: str) -> None:
        """Find the files of a pattern with stars or ranges.

        Raises:
            StorageError: none is there, or one of a range is missing.
        """
        folder, _, name = pattern.rpartition("/")
        self._home = Store(folder or "/")
        if found := _RANGE.search(name):
            first, last = found.groups()
            numbers = [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
            names = [name.replace(found[0], number) for number in numbers]
            missing = [one for one in names if not self._home.exists(one)]
        else:
            names = list(self._home.names(name))
            missing = [] if names else [name]
        if missing:
            raise StorageError(f"{self._home.url()} lacks {', '.join(missing[:5])}{' ...' * (len(missing) > 5)}")
        self._names, self._pattern = names, name

    def url(self, key: str = "") -> str:
        return self._home.url(key) if key else f"{self._home.url()}/{self._pattern}"

    def key(self, url: str) -> str:
        return self._home.key(url)

    def list(self) -> Iterator[Entry]:
        for name in self._names:
            for entry in open_collection(self._home.url(name)).list():
                yield Entry(f"{name}/{entry.key}", entry.size, entry.fingerprint)

    def read(self, key: str) -> bytes:
        collection, member = open_item(self._home.url(key))
        return collection.read(member)


def _stem(key: str) -> bytes:
    return posixpath.splitext(key)[0].encode()


def _cached(url: str, fingerprint: str, ending: str) -> Path:
    folder = cache_folder() / "containers"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / (hashlib.sha256(f"{url}|{fingerprint}".encode()).hexdigest()[:24] + ending)


class _held:  # noqa: N801 - used as `with _held(path)`
    """One process of this machine at a time; the others wait."""

    def __init__(self, path: Path) -> None:
        self._path = path.with_suffix(".lock")

    def __enter__(self) -> None:
        self._file = self._path.open("w")
        fcntl.flock(self._file, fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _local_copy(store: Store, entry: Entry) -> Path:
    """The file itself if it is local, else a copy in the cache."""
    if store.is_local:
        return Path(store.url(entry.key))
    target = _cached(store.url(entry.key), entry.fingerprint, posixpath.splitext(entry.key)[1])
    with _held(target):
        if not target.exists():
            part = target.with_suffix(".part")
            with store.open(entry.key) as source, part.open("wb") as sink:
                while data := source.read(_COPY_BYTES):
                    sink.write(data)
            part.replace(target)
    return target
