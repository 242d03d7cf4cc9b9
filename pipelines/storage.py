"""The one door to files and objects: list, read, and write whole or not at all, on any fsspec URL.

A `Store` is a prefix. Keys are relative to it, with '/' between their parts, and cannot leave it.
"""

import os
import posixpath
import stat
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec
from fsspec.implementations.local import LocalFileSystem

# One PUT either replaces the object or leaves it: no temporary name is needed (or possible) there.
_WHOLE_PUT = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "adl", "memory"})
# What a folder holds on Linux
_NAME_BYTES, _PATH_BYTES = 255, 4096


class StorageError(Exception):
    """A location that cannot be used at all: no such prefix, no permission, no such protocol."""


class UnsafeKey(ValueError):  # noqa: N818 - it names what is wrong with the value
    """A key that would leave its prefix, that its file system cannot hold, or that is no file: a pipe, a device."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One listed file. `fingerprint` is the store's etag, or size and modification time."""

    key: str
    size: int  # bytes
    fingerprint: str


def check_key(key: str) -> str:
    """Return `key`, or raise `UnsafeKey` when it is absolute, empty, or has '..', '.', NUL or empty parts."""
    parts = key.split("/")
    if any(part in {"", ".", ".."} for part in parts) or "\0" in key or "\\" in key:
        raise UnsafeKey(f"key {key!r} is not a plain relative path: rename the file without '..', '//' or '\\'")
    if readable(key) != key:
        raise UnsafeKey(f"key {readable(key)!r} is not UTF-8: rename the file")
    return key


def readable(key: str) -> str:
    """`key` with bytes that are no UTF-8 written out (caf\\xe9.png), so that any table and terminal can hold it.

    A backslash is doubled: no two keys become the same.
    """
    return key.replace("\\", "\\\\").encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


class Store:
    """A prefix on a file system, made inside the process that uses it (s3fs must not be forked or pickled)."""

    def __init__(self, url: str) -> None:
        """Open the prefix `url` (a local path or any fsspec URL). Nothing is read or created yet."""
        try:
            self.fs, root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise StorageError(f"cannot open {url}: {error}") from error
        self.root: str = root.rstrip("/") or "/"
        self.is_local = isinstance(self.fs, LocalFileSystem)

    def url(self, key: str = "") -> str:
        """The full URL of `key` (a plain path when the store is local)."""
        path = self._path(key) if key else self.root
        return path if self.is_local else str(self.fs.unstrip_protocol(path))

    def key(self, url: str) -> str:
        """The inverse of `url`. Raises UnsafeKey for a URL outside the prefix."""
        root = self.url().rstrip("/") + "/"
        if not url.startswith(root):
            raise UnsafeKey(f"{url} does not lie in {self.url()}")
        return url.removeprefix(root)

    def list(self) -> Iterator[Entry]:
        """Every file below the prefix, sorted by key.

        Raises:
            StorageError: the prefix does not exist or cannot be listed.
        """
        hint = "check the path, the bucket and the credentials"
        try:
            if not self.fs.exists(self.root):
                raise StorageError(f"nothing at {self.url()}: {hint}")
            if self.fs.isfile(self.root):
                raise StorageError(f"{self.url()} is a file: give the folder it lies in, and its name with --include")
            found = _find_local(self.root) if self.is_local else self.fs.find(self.root, detail=True)
        except StorageError:
            raise
        except Exception as error:  # every fsspec backend has its own (botocore's are no OSErrors)
            raise StorageError(f"cannot list {self.url()}: {type(error).__name__}: {error}: {hint}") from error
        prefix = self.root.rstrip("/") + "/"
        for path in sorted(found):
            info = found[path]
            yield Entry(path.removeprefix(prefix), int(info["size"]), _fingerprint(info))

    def exists(self, key: str) -> bool:
        """Whether `key` is there."""
        return bool(self.fs.exists(self._path(key)))

    def entry(self, key: str) -> Entry | None:
        """`key` as `list` would give it, None when it is not there."""
        path = self._path(key)
        try:
            info = self.fs.info(path)
        except FileNotFoundError:
            return None
        if self.is_local:  # as the listing does, which needs nanoseconds
            info = {"size": info["size"], "mtime": Path(path).stat().st_mtime_ns}
        return Entry(key, int(info["size"]), _fingerprint(info))

    def read(self, key: str, start: int | None = None, stop: int | None = None) -> bytes:
        """The content of `key`, or its bytes from `start` to `stop`.

        Raises FileNotFoundError when it is not there, and UnsafeKey when it is no file that ends.
        """
        path = self._path(key)
        if self.is_local:
            _check_file(path)
        return bytes(self.fs.cat_file(path, start=start, end=stop))

    def open(self, key: str, *, block_bytes: int | None = None) -> AbstractContextManager[BinaryIO]:
        """`key` for reading and seeking, fetched by `block_bytes`. 0 asks for all in one stream that cannot seek.

        An HTTP server without ranges serves the latter only: reading on elsewhere is a ValueError there.
        """
        return cast("AbstractContextManager[BinaryIO]", self.fs.open(self._path(key), "rb", block_size=block_bytes))

    def write(self, key: str, data: bytes) -> None:
        """Write `data` to `key`. A reader sees the old content or the new, never a part."""
        path = self._path(key)
        if self.fs.protocol in _WHOLE_PUT or _WHOLE_PUT.intersection(self.fs.protocol):
            self.fs.pipe_file(path, data)
            return
        folder = posixpath.dirname(path)
        self.fs.makedirs(folder, exist_ok=True)
        part = f"{folder}/.{uuid.uuid4().hex}.part"  # short: the name itself may have all the bytes allowed
        try:
            self.fs.pipe_file(part, data)
            if self.is_local:
                Path(part).replace(path)
            else:
                self.fs.mv(part, path)
        except BaseException:
            if self.fs.exists(part):
                self.fs.rm_file(part)
            raise

    def delete(self, key: str) -> None:
        """Remove `key`. Raises FileNotFoundError when it is not there."""
        self.fs.rm_file(self._path(key))

    def _path(self, key: str) -> str:
        path = posixpath.join(self.root, check_key(key))
        if self.is_local:
            _check_length(path)
        return path


def open_url(url: str) -> tuple[Store, str]:
    """Split the URL of one file into its folder's store and its name there."""
    folder, _, name = url.rpartition("/")
    return Store(folder or "/"), name


def _check_length(path: str) -> None:
    """Raises UnsafeKey for what Linux, macOS and Windows refuse: a name or a path that is too long."""
    longest, whole = max(len(os.fsencode(part)) for part in path.split("/")), len(os.fsencode(path))
    if longest > _NAME_BYTES or whole >= _PATH_BYTES:
        raise UnsafeKey(
            f"a name of {longest} bytes in a path of {whole}: a folder holds {_NAME_BYTES} and {_PATH_BYTES}; "
            "rename it, or write to an object store"
        )


def _check_file(path: str) -> None:
    """Raises UnsafeKey for what reading would wait for or go on with for ever: pipes, sockets, devices, links in a ring."""
    try:
        mode = Path(path).stat().st_mode
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UnsafeKey(f"{path} cannot be read: {error.strerror}: leave it out with --exclude") from error
    if not stat.S_ISREG(mode):
        raise UnsafeKey(f"{path} is no file but a pipe, a socket, a device or a folder: leave it out with --exclude")


def _find_local(root: str) -> dict[str, dict[str, Any]]:
    """Every file below `root`. Linked folders are entered (data sets are often links), a loop of links only once.

    fsspec's own walk leaves out linked folders and folders that cannot be read, without a word.
    """
    found: dict[str, dict[str, Any]] = {}
    entered, waiting = set[str](), [root]
    while waiting:
        folder = waiting.pop()
        real = os.path.realpath(folder)
        if real in entered:
            continue
        entered.add(real)
        with os.scandir(folder) as entries:
            for entry in entries:
                try:
                    if entry.is_dir():
                        waiting.append(entry.path)
                        continue
                    about = entry.stat()
                except OSError:  # a link to nothing, or links in a ring: it has a row, and reading it says why
                    about = entry.stat(follow_symlinks=False)
                found[entry.path] = {"size": about.st_size, "mtime": about.st_mtime_ns}
    return found


def _fingerprint(info: dict[str, Any]) -> str:
    etag = info.get("ETag") or info.get("etag") or info.get("md5Hash")
    if etag:
        return str(etag).strip('"')
    changed = info.get("mtime") or info.get("LastModified") or info.get("created") or ""
    return f"{info['size']}-{changed}"
