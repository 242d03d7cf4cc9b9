"""The one door to files and objects: list, read, and write whole or not at all, on any fsspec URL.

A `Store` is a prefix. Keys are relative to it, with '/' between their parts, and cannot leave it.
"""

import errno
import glob
import os
import posixpath
import stat
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

import fsspec
from fsspec.implementations.local import LocalFileSystem

from pipelines.retry import GaveUp, ShortRead, answer, chain, persist
from pipelines.storage_options import StorageOptions
from pipelines.walk import Page, walk

T = TypeVar("T")

# One PUT either replaces the object or leaves it: no temporary name is needed (or possible) there.
_WHOLE_PUT = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "adl", "memory"})
# What a folder holds on Linux
_NAME_BYTES, _PATH_BYTES = 255, 4096
_S3 = frozenset({"s3", "s3a"})
_WEB = frozenset({"http", "https"})
_S3_DEFAULTS: dict[str, Any] = {
    "use_listings_cache": False,  # others write there meanwhile
    "max_concurrency": 1,  # of one object: images are read side by side, and one request each is enough
    "config_kwargs": {"max_pool_connections": 32, "retries": {"mode": "standard", "total_max_attempts": 1}},
}


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


_in_force = StorageOptions()


def use(options: StorageOptions) -> None:
    """Open what this process opens from now on with these options.

    Raises:
        StorageError: they are for a file system that is not known, or not installed.
    """
    global _in_force  # noqa: PLW0603 - file systems are opened in many places of a process, all of one job
    for prefix in options.prefixes:
        try:
            fsspec.get_filesystem_class(prefix.partition("://")[0])
        except (ImportError, ValueError) as error:
            raise StorageError(f"storage {options.name}: cannot use {prefix}: {error}") from error
    _in_force = options


def in_force() -> StorageOptions:
    """The options that this process opens file systems with."""
    return _in_force


def _options_of(url: str) -> dict[str, Any]:
    given = _in_force.of(url)
    if url.partition("://")[0] not in _S3:
        return given
    config = {**_S3_DEFAULTS["config_kwargs"], **given.get("config_kwargs", {})}
    return {**_S3_DEFAULTS, **given, "config_kwargs": config}


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
    """A prefix on a file system, made inside the process that uses it (s3fs must not be forked or pickled).

    What fails for reasons that pass by themselves is tried again, and ends as `pipelines.retry.GaveUp` if it has to.
    """

    def __init__(self, url: str) -> None:
        """Open the prefix `url` (a local path or any fsspec URL). Nothing is read or created yet."""
        try:
            self.fs, root = fsspec.core.url_to_fs(url, **_options_of(url))
        except (ImportError, ValueError) as error:
            raise StorageError(f"cannot open {url}: {error}") from error
        self.root: str = root.rstrip("/") or "/"
        protocols = {self.fs.protocol} if isinstance(self.fs.protocol, str) else set(self.fs.protocol)
        self.is_local = isinstance(self.fs, LocalFileSystem)
        self.is_web = bool(protocols & _WEB)
        self._is_s3 = bool(protocols & _S3)
        self._whole_put = bool(protocols & _WHOLE_PUT)
        if self._is_s3:
            self.fs.retries = 1  # the number of attempts: those of `pipelines.retry` are the ones that count

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
        """Every file below the prefix, sorted by key, while it is found: memory holds a few folders or pages of it.

        Raises:
            StorageError: the prefix does not exist or cannot be listed.
        """
        try:
            if not self._is_s3:
                self.check_folder()
            last = ""
            for key, info in (
                self._walk_local() if self.is_local else walk(self._s3_page if self._is_s3 else self._page)
            ):
                if key <= last:
                    raise StorageError(f"{self.url()} is listed out of order ({last!r} before {key!r}): not supported")
                last = key
                yield Entry(key, int(info.get("size") or 0), _fingerprint(info))
            if not last and self._is_s3:
                self.check_folder()
        except StorageError:
            raise
        except Exception as error:  # every fsspec backend has its own (botocore's are no OSErrors)
            raise self._explained("list", error) from error

    def check_folder(self) -> None:
        """See that the prefix is a folder.

        Raises:
            StorageError: it is not there, is a file, or cannot be looked at, with what to check.
        """
        if self.is_web:
            raise StorageError(
                f"{self.url()}: a web server lists nothing: give a .csv, .jsonl or .parquet of its files"
            )
        try:
            kind = self._info(self.root)["type"]
        except FileNotFoundError as error:
            raise StorageError(f"nothing at {self.url()}: check the path, the bucket and the credentials") from error
        except Exception as error:  # every fsspec backend has its own
            raise self._explained("look at", error) from error
        if kind == "file":
            raise StorageError(f"{self.url()} is a file: give the folder it lies in, and its name with --include")

    def check_writable(self) -> None:
        """Write and remove an empty file, so that what forbids it is met before any work.

        Raises:
            StorageError: it cannot be done, with what to check.
        """
        probe = f".{uuid.uuid4().hex}.probe"
        try:
            self.write(probe, b"")
            self.delete(probe)
        except Exception as error:
            raise self._explained("write to", error) from error

    def check_readable(self, keys: Sequence[str]) -> None:
        """Read a byte of each, so that a missing permission to read is met before any work.

        Raises:
            StorageError: all are denied.
        """
        for key in keys:
            try:
                self.read(key, 0, 1)
            except PermissionError as error:
                denied = error
            except Exception:  # noqa: BLE001 - it will be that one file's own end
                return
            else:
                return
        if keys:
            raise self._explained("read from", denied) from denied

    def is_folder(self) -> bool:
        """Whether the prefix is a folder that is there."""
        return bool(self._persist("look up", self.root, lambda: self.fs.isdir(self.root)))

    def exists(self, key: str) -> bool:
        """Whether `key` is there."""
        try:
            self._info(self._path(key))
        except FileNotFoundError:
            return False
        return True

    def info(self, key: str) -> dict[str, Any]:
        """What the file system says of `key`, in its own words. Raises FileNotFoundError when it is not there."""
        return self._info(self._path(key))

    def entry(self, key: str) -> Entry | None:
        """`key` as `list` would give it, None when it is not there."""
        path = self._path(key)
        try:
            info = self._info(path)
        except FileNotFoundError:
            return None
        if self.is_local:  # as the listing does, which needs nanoseconds
            info = {"size": info["size"], "mtime": Path(path).stat().st_mtime_ns}
        return Entry(key, int(info.get("size") or 0), _fingerprint(info))

    def names(self, pattern: str) -> Sequence[str]:
        """What matches a glob below the prefix, folders too: relative names, sorted."""
        found = self._persist("list", self.root, lambda: self.fs.glob(f"{glob.escape(self.root)}/{pattern}"))
        return sorted(path.rstrip("/").removeprefix(f"{self.root.rstrip('/')}/") for path in found)

    def read(self, key: str, start: int | None = None, stop: int | None = None, *, size: int | None = None) -> bytes:
        """The content of `key`, or its bytes from `start` to `stop`.

        With the `size` that was listed, or with both ends, an answer that lacks bytes is asked for again. Raises
        FileNotFoundError when it is not there, and UnsafeKey when it is no file that ends.
        """
        path = self._path(key)
        if self.is_local:
            _check_file(path)
        wanted = size if start is None or stop is None else stop - start

        def read() -> bytes:
            data = bytes(self.fs.cat_file(path, start=start, end=stop))
            if wanted is not None and len(data) < wanted:
                there = int(self.fs.info(path).get("size") or 0)  # it may have become shorter, or end before `stop`
                expected = min(there, there if stop is None else stop) - (start or 0)
                if len(data) < expected:
                    raise ShortRead(f"{len(data)} of {expected} bytes came")
            return data

        return self._persist("read", path, read)

    def open(self, key: str, *, block_bytes: int | None = None) -> AbstractContextManager[BinaryIO]:
        """`key` for reading and seeking, fetched by `block_bytes`. 0 asks for all in one stream that cannot seek.

        An HTTP server without ranges serves the latter only: reading on elsewhere is a ValueError there. A stream that
        breaks is not asked for again.
        """
        path = self._path(key)
        file = self._persist("open", path, lambda: self.fs.open(path, "rb", block_size=block_bytes))
        cache = getattr(file, "cache", None)  # of a file that is fetched in ranges
        if cache is not None:
            fetch = cache.fetcher
            cache.fetcher = lambda start, stop: self._persist("read", path, lambda: fetch(start, stop))
        return cast("AbstractContextManager[BinaryIO]", file)

    def write(self, key: str, data: bytes) -> None:
        """Write `data` to `key`. A reader sees the old content or the new, never a part."""
        path = self._path(key)
        self._persist("write", path, lambda: self._write(path, data))

    def _write(self, path: str, data: bytes) -> None:
        if self._whole_put:
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
            self._persist("create", path, lambda: self.fs.pipe_file(path, data, mode="create"))
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
        """Remove `key`. Raises FileNotFoundError when it is not there (a bucket does not tell)."""
        path = self._path(key)
        self._persist("delete", path, lambda: self.fs.rm_file(path))

    def _path(self, key: str) -> str:
        path = posixpath.join(self.root, check_key(key))
        if self.is_local:
            _check_length(path)
        return path

    def _info(self, path: str) -> dict[str, Any]:
        return dict(self._persist("look up", path, lambda: self.fs.info(path)))

    def _persist(self, doing: str, path: str, call: Callable[[], T]) -> T:
        return persist(f"cannot {doing} {path}", call)

    def _s3_page(self, folder: str, more: str | None) -> Page[dict[str, Any]]:
        """1000 keys of a folder, or fewer. s3fs itself would hold all of a folder, and merge 'a//b' with 'a/b'."""
        bucket, prefix, _ = self.fs.split_path(self.root)
        home = f"{prefix}/" if prefix else ""
        request = {"Bucket": bucket, "Prefix": home + folder, "Delimiter": "/", **self.fs.req_kw}
        if more:
            request["ContinuationToken"] = more
        page = self._persist("list", f"{bucket}/{home}{folder}", lambda: self.fs.call_s3("list_objects_v2", **request))
        items: list[tuple[str, dict[str, Any] | None]] = [
            (item["Key"].removeprefix(home), {"size": item["Size"], "ETag": item["ETag"]})
            for item in page.get("Contents", [])
            if not item["Key"].endswith("/")  # an empty object that stands for a folder
        ]
        items += [(item["Prefix"].removeprefix(home), None) for item in page.get("CommonPrefixes", [])]
        return Page(sorted(items, key=lambda item: item[0]), page.get("NextContinuationToken"))

    def _page(self, folder: str, _more: str | None) -> Page[dict[str, Any]]:
        """All of one folder, on whatever else there is."""
        path, home = f"{self.root}/{folder}".rstrip("/"), self.root.rstrip("/") + "/"

        def ask() -> list[dict[str, Any]]:
            self.fs.invalidate_cache()  # others write there meanwhile
            if "//" in folder:  # a part without a name, which `ls` cannot be asked for
                return list(self.fs.find(path, detail=True).values())
            return list(self.fs.ls(path, detail=True))

        items: list[tuple[str, dict[str, Any] | None]] = []
        for info in self._persist("list", path, ask):
            known = None if info["type"] == "directory" else info
            key = info["name"].removeprefix(home) + ("/" if known is None else "")
            if key.startswith(folder) and key != folder:
                items.append((key, known))
        return Page(sorted(items, key=lambda item: item[0]))

    def _walk_local(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Every file below the root. Linked folders are entered (data sets are often links), each only once.

        A link to a folder below the root is left out: what is there has its own name. fsspec's own walk leaves out
        linked folders and folders that cannot be read, without a word.
        """
        real_root = os.path.realpath(self.root)
        linked = set[str]()  # real paths of folders outside, each reached by the first of its names
        levels = [_names(self.root, "")]
        while levels:
            key = next(levels[-1], None)
            if key is None:
                levels.pop()
                continue
            path = f"{self.root.rstrip('/')}/{key}"
            if not key.endswith("/"):
                yield key, _local_info(path)
                continue
            real = os.path.realpath(path)
            if f"{real}/".startswith(f"{real_root}/".replace("//", "/")):
                if Path(path.rstrip("/")).is_symlink():
                    continue
            elif real in linked:
                continue
            else:
                linked.add(real)
            levels.append(_names(path, key))

    def _explained(self, doing: str, error: Exception) -> StorageError:
        """What a person can check when the whole prefix cannot be used."""
        names = {base.__name__ for one in chain(error) for base in type(one).__mro__}
        answers = [answer(one) for one in chain(error)]
        status = next((status for status, _ in answers if status is not None), None)
        code = next((code for _, code in answers if code), "")
        keys = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or --storage" if self._is_s3 else "--storage"
        if code == "NoSuchBucket":
            hint = (
                "there is no such bucket: check its name, the region, and the endpoint (AWS_ENDPOINT_URL or --storage)"
            )
        elif names & {"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ProfileNotFound"}:
            hint = f"{error}: check {keys}; a public bucket takes anon = true there"
        elif code in {"InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"}:
            hint = f"the credentials are refused ({code}): check {keys}"
        elif isinstance(error, PermissionError) and self.is_local:
            hint = f"{error}: check the owner and the mode of the folder"
        elif isinstance(error, PermissionError) or status in {401, 403}:
            hint = f"access is denied ({code or status}): check what the credentials may do there, and {keys}"
        elif isinstance(error, GaveUp):
            hint = f"{error}: check the network and the endpoint"
        else:
            hint = f"{type(error).__name__}: {error}: check the path, the bucket and the credentials"
        return StorageError(f"cannot {doing} {self.url()}: {hint}")


def open_url(url: str) -> tuple[Store, str]:
    """Split the URL of one file into its folder's store and its name there."""
    folder, _, name = url.rpartition("/")
    return Store(folder or "/"), name


def _check_length(path: str) -> None:
    """Raises UnsafeKey for what Linux, macOS and Windows refuse: a name or a path that is too long."""
    if len(path) <= _NAME_BYTES and path.isascii():
        return
    longest, whole = max(len(os.fsencode(part)) for part in path.split("/")), len(os.fsencode(path))
    if longest > _NAME_BYTES or whole >= _PATH_BYTES:
        raise UnsafeKey(
            f"a name of {longest} bytes in a path of {whole}: a folder holds {_NAME_BYTES} and {_PATH_BYTES}; "
            "rename it, or write to an object store"
        )


def _check_file(path: str) -> None:
    """Raises UnsafeKey for what reading would wait for or go on with for ever: a pipe, a device, links in a ring."""
    try:
        mode = Path(path).stat().st_mode
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise UnsafeKey(f"{path} is a link that leads round in a ring: leave it out with --exclude") from error
    if not stat.S_ISREG(mode):
        raise UnsafeKey(f"{path} is no file but a pipe, a socket, a device or a folder: leave it out with --exclude")


def _names(folder: str, key: str) -> Iterator[str]:
    """The keys in one local folder, sorted; those of folders end in '/'."""
    with os.scandir(folder) as entries:
        names = [f"{entry.name}/" if _is_folder(entry) else entry.name for entry in entries]
    return (key + name for name in sorted(names))


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # links in a ring: they have a row, and reading them says why
        return False


def _local_info(path: str) -> dict[str, Any]:
    try:
        found = os.stat(path)  # noqa: PTH116 - for each of millions
    except OSError:  # a link to nothing: it has a row, and reading it says why
        found = os.lstat(path)
    return {"size": found.st_size, "mtime": found.st_mtime_ns}


def _fingerprint(info: dict[str, Any]) -> str:
    etag = info.get("ETag") or info.get("etag") or info.get("md5Hash")
    if etag:
        return str(etag).strip('"')
    times = ("mtime", "LastModified", "Last-Modified", "created")
    changed = next((info[name] for name in times if info.get(name)), "")
    return f"{info.get('size')}-{changed}"
