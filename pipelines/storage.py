"""The one door to files and objects: list, read, and write whole or not at all, on any fsspec URL.

A `Store` is a prefix. Keys are relative to it, with '/' between their parts, and cannot leave it.
"""

import os
import posixpath
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


class StorageError(Exception):
    """A location that cannot be used at all: no such prefix, no permission, no such protocol."""


class UnsafeKey(ValueError):  # noqa: N818 - it names what is wrong with the value
    """A key that would leave its prefix, or that no file system can hold."""


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
    """`key` with bytes that are no UTF-8 written out (caf\\xe9.png), so that any table and terminal can hold it."""
    return key.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


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
        """The content of `key`, or its bytes from `start` to `stop`. Raises FileNotFoundError when it is not there."""
        return bytes(self.fs.cat_file(self._path(key), start=start, end=stop))

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

    def create(self, key: str, data: bytes) -> None:
        """Write `data` to `key` unless it is there. Raises FileExistsError.

        Of two at once one wins on a local disk and on AWS. Other stores may let both think so: who relies on it reads
        back what is there after a moment.
        """
        path = self._path(key)
        if not self.is_local:
            self.fs.pipe_file(path, data, mode="create")
            return
        folder = posixpath.dirname(path)
        self.fs.makedirs(folder, exist_ok=True)
        part = Path(f"{folder}/.{uuid.uuid4().hex}.part")
        try:
            part.write_bytes(data)
            Path(path).hardlink_to(part)
        finally:
            part.unlink(missing_ok=True)

    def delete(self, key: str) -> None:
        """Remove `key`. Raises FileNotFoundError when it is not there."""
        self.fs.rm_file(self._path(key))

    def _path(self, key: str) -> str:
        return posixpath.join(self.root, check_key(key))


def open_url(url: str) -> tuple[Store, str]:
    """Split the URL of one file into its folder's store and its name there."""
    folder, _, name = url.rpartition("/")
    return Store(folder or "/"), name


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
                if entry.is_dir():
                    waiting.append(entry.path)
                    continue
                try:
                    stat = entry.stat()
                except OSError:  # a link to nothing: it has a row, and reading it says why
                    stat = entry.stat(follow_symlinks=False)
                found[entry.path] = {"size": stat.st_size, "mtime": stat.st_mtime_ns}
    return found


def _fingerprint(info: dict[str, Any]) -> str:
    etag = info.get("ETag") or info.get("etag") or info.get("md5Hash")
    if etag:
        return str(etag).strip('"')
    changed = info.get("mtime") or info.get("LastModified") or info.get("created") or ""
    return f"{info['size']}-{changed}"
