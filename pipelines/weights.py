"""From what a person names as checkpoint (a file, a URL, a catalog name) to a file on this machine.

A fetched file appears under its name whole and checked, or not at all. Until then it is a `.part` beside it, which the
next attempt continues. One process of a node fetches and the others wait for its lock, which ends with the process.
"""

import fcntl
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from nafnet import catalog
from nafnet.catalog import CatalogEntry
from nafnet.checkpoint import CheckpointError
from pipelines.cache import cache_folder

if TYPE_CHECKING:
    from pipelines.storage import Store

logger = logging.getLogger(__name__)

_CHUNK_BYTES = 8 * 2**20  # per request: aiohttp ends one after 300 s, also on a slow line
_LINES = 5  # of progress, per file
_LINE_BYTES = 100_000_000  # between two lines where the size is not known
_SAID_CHARS = 200
# What says, in one kind of store or another, that a file is still the same one.
_VERSIONS = ("ETag", "etag", "Last-Modified", "LastModified", "mtime", "created")


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A file that shall be in the cache, with what is known of it beforehand."""

    target: Path
    size: int | None = None  # bytes
    sha256: str | None = None


@dataclass(frozen=True, slots=True)
class _Source:
    """A file in one place, as it was when it was looked up."""

    store: "Store" = field(compare=False)
    name: str
    size: int | None  # bytes
    version: str | None  # an etag or a time


class _OtherFileError(CheckpointError):
    """What was fetched is whole, and not what was wanted."""


def locate(checkpoint: str) -> Path:
    """A local file for `checkpoint`, fetched into the cache first when it is a URL or a published name.

    A published file is looked for in the cache, below NAFNET_WEIGHTS and on the mirrors, and its SHA-256 is checked
    every time. Where none is published, that of the first use is recorded and takes its place.

    Raises:
        CheckpointError: it is neither a file nor a known name, could not be fetched, or is not the file it should be.
    """
    entry = catalog.CATALOG.get(checkpoint)
    if entry is not None:
        return entry.bundled_path() or _locate_published(entry)
    if "://" in checkpoint:
        return _locate_url(checkpoint)
    path = Path(checkpoint).expanduser().absolute()
    if not path.is_file():
        known = ", ".join(catalog.CATALOG)
        raise CheckpointError(f"no checkpoint at {path}, and no catalog entry of that name; it has {known}")
    return path


def _locate_url(url: str) -> Path:
    _refuse_secrets(url, "the checkpoint's URL")
    name = url.rpartition("/")[2]
    target = cache_folder() / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{name}"
    if not target.is_file():
        with _alone(target):
            if not target.is_file():
                _download(url.removesuffix(name), name, _Wanted(target))
    return target


def _locate_published(entry: CatalogEntry) -> Path:
    target = cache_folder() / entry.file
    if not target.is_file():
        with _alone(target):
            if not target.is_file():
                _fetch(entry, target)
    _check_cached(entry, target)
    return target


def _fetch(entry: CatalogEntry, target: Path) -> None:
    """Take a published file from the first place that has it. Raises CheckpointError with what each of them said."""
    wanted = _Wanted(target, entry.size, entry.sha256 or _recorded().get(entry.name))
    tried = []
    for prefix in _places():
        try:
            _download(prefix, entry.file, wanted)
        except CheckpointError as error:
            logger.info("%s", error)
            tried.append(str(error))
        else:
            return
    raise CheckpointError(
        "\n".join(
            [
                f"{entry.file} is not on this machine and could not be fetched",
                f"  expected SHA-256: {wanted.sha256 or 'none known'}",
                *(f"  {one}" for one in tried),
                "  Do one of these:",
                f"  - put it into the cache folder: {target}",
                "  - set NAFNET_WEIGHTS to a folder or URL prefix that holds it",
                "  - give its path as --checkpoint",
            ]
        )
    )


def own_prefix() -> str | None:
    """Where NAFNET_WEIGHTS says that checkpoints lie, as another machine can be told: a whole path or a URL.

    None also for a URL that may hold a secret: `locate` refuses it, and a job that needs no such place goes on.
    """
    own = os.environ.get("NAFNET_WEIGHTS", "")
    try:
        _refuse_secrets(own, "NAFNET_WEIGHTS")
    except CheckpointError as error:
        logger.warning("other machines are not told of NAFNET_WEIGHTS: %s", error)
        return None
    if own and "://" not in own:
        return str(Path(own).expanduser().absolute())
    return own or None


def adopt_prefix(prefix: str | None) -> None:
    """Look below the `own_prefix` of the process that planned the work, where this process has none of its own."""
    if prefix is not None and not os.environ.get("NAFNET_WEIGHTS"):
        os.environ["NAFNET_WEIGHTS"] = prefix


def _places() -> tuple[str, ...]:
    own = os.environ.get("NAFNET_WEIGHTS", "")
    _refuse_secrets(own, "NAFNET_WEIGHTS")
    return (own, *catalog.MIRRORS) if own else catalog.MIRRORS


def _refuse_secrets(url: str, what: str) -> None:
    """Raises CheckpointError for a URL that may hold a secret, without repeating it: places are logged and recorded."""
    scheme, found, rest = url.partition("://")
    user, _, _ = rest.partition("/")[0].rpartition("@")
    if found and (":" in user or (user and scheme.startswith("http"))):
        raise CheckpointError(
            f"{what} holds a user or password: give it without; credentials come from the environment"
        )
    if found and "?" in rest:
        raise CheckpointError(f"{what} has a query, which may hold a signature: give it without '?' and what follows")


def _check_cached(entry: CatalogEntry, path: Path) -> None:
    """Hold a file in the cache to its SHA-256. Raises CheckpointError and leaves it where it is."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    expected = entry.sha256 or _hold_to(entry.name, found)
    if found == expected:
        return
    size = path.stat().st_size
    lines = [
        f"{path} is not the {entry.name} it should be; it was not loaded",
        f"  its SHA-256: {found} ({size} bytes)",
        f"  expected:    {expected}" + (f" ({entry.size} bytes)" if entry.size else ""),
        "  Delete it or move it away to have it fetched anew, or give its path as --checkpoint to use it as it is",
    ]
    if entry.sha256 is None:
        lines.append(f"  The hash is that of its first use; to accept another, remove {entry.name} from {_hashes()}")
    raise CheckpointError("\n".join(lines))


def _hashes() -> Path:
    return cache_folder() / "hashes.json"


def _recorded() -> dict[str, str]:
    """SHA-256 by catalog name, as recorded on first use. Raises CheckpointError when the file is damaged."""
    try:
        content = json.loads(_hashes().read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise CheckpointError(
            f"{_hashes()} is damaged ({error}): mend or delete it; hashes are then recorded anew"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{_hashes()} is no table of names and hashes: mend or delete it")
    return content


def _hold_to(name: str, found: str) -> str:
    """The recorded SHA-256 of `name`, which is `found` on its first use."""
    recorded = _recorded()
    if name not in recorded:
        with _alone(_hashes()):
            recorded = _recorded()
            if name not in recorded:
                recorded[name] = found
                part = _hashes().with_suffix(".json.part")
                part.write_text(json.dumps(recorded, indent=2, sort_keys=True) + "\n")
                part.replace(_hashes())
                logger.info("%s: no hash is published; recorded SHA-256 %s in %s", name, found, _hashes())
    return recorded[name]


@contextmanager
def _alone(target: Path) -> Iterator[None]:
    """Be the only process of this node that makes `target`. Raises CheckpointError when the cache is not writable."""
    with ExitStack() as stack:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(target.with_name(f".{target.name}.lock").open("a"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logger.info("waiting for another process that is making %s", target)
                fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            raise CheckpointError(
                f"cannot write to the cache folder {target.parent} ({error.strerror}): "
                "set NAFNET_CACHE to a folder that can be written"
            ) from error
        yield


def _download(prefix: str, name: str, wanted: _Wanted) -> None:
    """Fetch `name` below `prefix`, whole and checked, to `wanted.target`. The caller holds its lock.

    Raises:
        CheckpointError: it is not there, is another file, or the transfer broke off; then its part stays.
    """
    # Here, not above: the model library alone, without fsspec, must still find files and bundled weights.
    from pipelines.storage import Store  # noqa: PLC0415

    try:
        source = _look(Store(prefix), name)
        if wanted.size and source.size not in {None, wanted.size}:
            raise _OtherFileError(f"it has {source.size} bytes there, expected {wanted.size}")
        part = _part(source, wanted)
        continued = part.exists()
        try:
            _complete(source, part, wanted)
        except _OtherFileError:
            if not continued:
                raise
            logger.info("%s: the part from before does not belong to it; starting anew", name)
            _complete(source, part, wanted)
    except Exception as error:  # every fsspec backend has its own
        raise CheckpointError(f"could not fetch {prefix.rstrip('/')}/{name}\n    {_said(error)}") from error


def _look(store: "Store", name: str) -> _Source:
    info = store.info(name)  # not Store.entry: an HTTP server need not tell the size
    version = next((str(info[key]) for key in _VERSIONS if info.get(key)), None)
    return _Source(store, name, info.get("size"), version)


def _part(source: _Source, wanted: _Wanted) -> Path:
    """Where the part is kept: named for a SHA-256, which any place can continue, or for one version in one place."""
    version = f"{source.store.url(source.name)}|{source.size}|{source.version}"
    whole = wanted.sha256 or hashlib.sha256(version.encode()).hexdigest()
    part = wanted.target.with_name(f".{wanted.target.name}.{whole[:16]}.part")
    if wanted.sha256 is None and source.version is None:  # nothing tells whether it is of the same file
        part.unlink(missing_ok=True)
    return part


def _complete(source: _Source, part: Path, wanted: _Wanted) -> None:
    """Fill the part, check it and give it its name. Raises _OtherFileError, with the part deleted, for a wrong file."""
    _fill(source, part)
    with part.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if wanted.sha256 not in {None, found}:
        part.unlink()
        raise _OtherFileError(f"its SHA-256 there is {found}, expected {wanted.sha256}")
    if wanted.sha256 is None and _look(source.store, source.name) != source:
        part.unlink()
        raise _OtherFileError("it changed while it was read: try again")
    part.replace(wanted.target)
    for left in wanted.target.parent.iterdir():  # parts of other versions
        if left.name.startswith(f".{wanted.target.name}.") and left.suffix == ".part":
            left.unlink()


def _fill(source: _Source, part: Path) -> None:
    """Read until the part is complete; after an error go on for as long as each attempt adds to it."""
    while True:
        had = part.stat().st_size if part.exists() else 0
        try:
            with part.open("ab") as out:
                _continue(source, out)
        except Exception as error:
            if part.stat().st_size <= had:
                raise
            logger.info("%s: interrupted (%s); trying to go on", source.name, _said(error))
        else:
            return


def _continue(source: _Source, out: BinaryIO) -> None:
    if source.size is not None and out.tell() > source.size:
        out.truncate(0)
    if out.tell() == source.size:
        return
    try:
        _copy(source, out, block_bytes=_CHUNK_BYTES)
    except ValueError:  # what fsspec raises where the server has no ranges
        logger.info("%s: this server cannot continue a file; starting anew", source.name)
        out.truncate(0)
        _copy(source, out, block_bytes=0)


def _copy(source: _Source, out: BinaryIO, *, block_bytes: int) -> None:
    """Append what `out` lacks. Raises EOFError when that ends short of the size, ValueError where nothing can seek."""
    done = out.seek(0, os.SEEK_END)
    size = source.size
    with source.store.open(source.name, block_bytes=block_bytes) as file:
        if done:
            file.seek(done)
        total = f"{size / 1e6:.1f} MB" if size is not None else "size not known"
        here = f", {done / 1e6:.1f} MB are here" if done else ""
        logger.info("fetching %s (%s%s)", source.store.url(source.name), total, here)
        while data := file.read(_CHUNK_BYTES):
            out.write(data)
            out.flush()
            _tell(source.name, done, done + len(data), size)
            done += len(data)
    if size is not None and done != size:
        raise EOFError(f"it ended after {done} of {size} bytes")


def _tell(name: str, before: int, done: int, size: int | None) -> None:
    if size is None:
        if done // _LINE_BYTES > before // _LINE_BYTES:
            logger.info("%s: %.1f MB", name, done / 1e6)
    elif done * _LINES // size > before * _LINES // size:
        logger.info("%s: %.1f of %.1f MB, %.0f %%", name, done / 1e6, size / 1e6, 100 * done / size)


def _said(error: BaseException) -> str:
    """The first cause on one line, without the queries of URLs: that of a redirect may hold a signature."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = re.sub(r"\?[^\s'\")]+", "", " ".join(str(error).split()))
    return (text if isinstance(error, CheckpointError) else f"{type(error).__name__}: {text}")[:_SAID_CHARS]
