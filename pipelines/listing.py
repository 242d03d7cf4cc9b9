"""What there is, as columns: the files of a store, and pairs that a person wrote down.

A person's list is a Parquet, CSV or JSONL file with the columns `source` and, if wanted, `reference`. Its places are
URLs, paths, or relative to the file's own folder. Their keys are what follows the folder that all of them share.
"""

import posixpath
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.json as pa_json
import pyarrow.parquet as pq

from pipelines.arrow import arrow_file
from pipelines.storage import Entry, StorageError, Store, UnsafeKey, check_key, readable

ROWS = 50_000  # that are Python objects at once: a million of those would take a gigabyte

# `unsafe` says why no result can have this key; a name that is not text stands there as `readable` writes it.
LISTED = pa.schema([(name, pa.string()) for name in ("key", "fingerprint", "unsafe")] + [("size", pa.int64())])

_READERS: dict[str, Callable[[Any], pa.Table]] = {
    ".parquet": pq.read_table,
    ".csv": pa_csv.read_csv,
    ".jsonl": pa_json.read_json,
}
_AT_ONCE = 16  # requests to a web server


def tables(entries: Iterable[Entry]) -> Iterator[pa.Table]:
    """The entries in their order, as tables (`LISTED`) of at most `ROWS` rows."""
    entries = iter(entries)
    while some := list(islice(entries, ROWS)):
        columns = {
            "key": [readable(entry.key) for entry in some],
            "fingerprint": [entry.fingerprint for entry in some],
            "unsafe": [_unsafe(entry.key) for entry in some],
            "size": [entry.size for entry in some],
        }
        yield pa.table(columns, LISTED)


def listed(entries: Iterable[Entry]) -> pa.Table:
    """All entries as one table (`LISTED`)."""
    return pa.concat_tables([LISTED.empty_table(), *tables(entries)])


def mapped(column: pa.ChunkedArray, change: Callable[[Any], str | None]) -> pa.ChunkedArray:
    """`change` of every text of the column; null stays null."""
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    pieces = (chunk.slice(start, ROWS) for chunk in chunks for start in range(0, len(chunk), ROWS))
    texts = ([text if text is None else change(text) for text in piece.to_pylist()] for piece in pieces)
    return pa.chunked_array([pa.array(some, pa.string()) for some in texts], pa.string())


def _unsafe(key: str) -> str | None:
    try:
        check_key(key)
    except UnsafeKey as error:
        return str(error)
    return None


@dataclass(frozen=True, slots=True)
class Listing:
    """`source` and `reference` are the folders that hold all of them.

    `rows` has the columns of `LISTED`, and with a reference `partner` (its key) and `partner_fingerprint`, which are
    null for a source without one.
    """

    source: str
    reference: str | None
    rows: pa.Table


def is_listing(url: str) -> bool:
    """Whether the name is that of a list of pairs."""
    return posixpath.splitext(url)[1].lower() in _READERS


def read_listing(url: str) -> Listing:
    """Read a list of pairs, and look up each of its files once.

    A file that is not there stays in the list, of size 0: it ends as a row that says so.

    Raises:
        StorageError: the list cannot be read, lacks the column `source`, has an empty or repeated one, or mixes places
            that share no folder.
    """
    home, _, name = url.rpartition("/")
    store = Store(home or "/")
    try:
        data = store.read(name)
        table = _READERS[posixpath.splitext(name)[1].lower()](arrow_file(data))
    except FileNotFoundError as error:
        raise StorageError(f"no list of pairs at {store.url(name)}") from error
    except (pa.ArrowException, OSError) as error:
        raise StorageError(f"{store.url(name)} is no list of pairs that can be read: {error}") from error
    if "source" not in table.column_names:
        raise StorageError(
            f"{store.url(name)} has the columns {', '.join(table.column_names)}: source and reference are needed"
        )
    sources = _places(table["source"], store)
    if sources.null_count or pc.count_distinct(sources).as_py() < len(sources):
        raise StorageError(f"{store.url(name)} has sources that are empty or stand there twice")
    source = _shared(sources, url)
    rows = _look_up(source, sources)
    references = _places(table["reference"], store) if "reference" in table.column_names else None
    if references is None or references.null_count == len(references):
        return Listing(source, None, rows)
    reference = _shared(references.drop_null(), url)
    partners = _look_up(reference, references)
    partners = partners.select(["key", "fingerprint"]).rename_columns(["partner", "partner_fingerprint"])
    for name in partners.column_names:
        rows = rows.append_column(name, partners[name])
    return Listing(source, reference, rows)


def _places(column: pa.ChunkedArray, store: Store) -> pa.ChunkedArray:
    """Whole URLs, or whole paths where the list is local; null for none."""
    home = store.url()

    def place(text: str) -> str | None:
        text = text.removeprefix("file://")
        if not text or "://" in text or text.startswith("/"):
            return text or None
        return f"{home}/{posixpath.normpath(text)}"

    return mapped(column.cast(pa.string()), place)


def _shared(places: pa.ChunkedArray, url: str) -> str:
    """The folder that all of them lie in."""
    folders = set(pc.unique(mapped(places, posixpath.dirname)).to_pylist())
    protocols = {folder.partition("://")[0] if "://" in folder else "" for folder in folders}
    shared = posixpath.commonpath(folders) if len(protocols) == 1 else ""
    if not shared.replace(":", "").strip("/") or shared.rstrip("/").endswith(":"):
        raise StorageError(f"{url}: the files share no folder or bucket: make a list for each")
    return shared.replace(":/", "://", 1) if protocols != {""} and "://" not in shared else shared


def _look_up(folder: str, places: pa.ChunkedArray) -> pa.Table:
    """The rows (`LISTED`) of these places, in their order.

    Looked up by listing the folder they share once, or one by one on the web.
    """
    store = Store(folder)
    keys = mapped(places, lambda place: place.removeprefix(f"{folder}/"))
    if store.is_web:
        with ThreadPoolExecutor(_AT_ONCE) as threads:
            entries = threads.map(store.entry, keys.drop_null().to_pylist())
            there = listed(entry for entry in entries if entry)
    else:
        there = listed(store.list())
    found = there.take(pc.index_in(keys, value_set=there["key"]))
    prints = pc.if_else(keys.is_valid(), pc.coalesce(found["fingerprint"], "missing"), None)
    columns = {
        "key": keys,
        "fingerprint": prints,
        "unsafe": mapped(keys, _unsafe),
        "size": pc.coalesce(found["size"], 0),
    }
    return pa.table(columns, LISTED)
