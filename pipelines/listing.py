"""Pairs that a person wrote down: a Parquet, CSV or JSONL file with the columns `source` and, if wanted, `reference`.

Places are URLs, paths, or relative to the file's own folder. Their keys are what follows the folder that all of them
share.
"""

import posixpath
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.json as pa_json
import pyarrow.parquet as pq

from pipelines.storage import Entry, StorageError, Store

_READERS: dict[str, Callable[[Any], pa.Table]] = {
    ".parquet": pq.read_table,
    ".csv": pa_csv.read_csv,
    ".jsonl": pa_json.read_json,
}
_AT_ONCE = 16  # requests to a web server


@dataclass(frozen=True, slots=True)
class Listing:
    """`source` and `reference` are the folders that hold all of them; a partner is found by the source's key."""

    source: str
    reference: str | None
    entries: list[Entry]
    partner: Callable[[str], Entry | None] | None


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
        table = _READERS[posixpath.splitext(name)[1].lower()](pa.BufferReader(data))
    except FileNotFoundError as error:
        raise StorageError(f"no list of pairs at {store.url(name)}") from error
    except (pa.ArrowException, OSError) as error:
        raise StorageError(f"{store.url(name)} is no list of pairs that can be read: {error}") from error
    if "source" not in table.column_names:
        raise StorageError(
            f"{store.url(name)} has the columns {', '.join(table.column_names)}: source and reference are needed"
        )
    sources = _places(table, "source", store)
    if len(set(sources)) < len(sources) or not all(sources):
        raise StorageError(f"{store.url(name)} has sources that are empty or stand there twice")
    references = _places(table, "reference", store) if "reference" in table.column_names else [""] * len(sources)
    source = _shared(sources, url)
    entries = _entries(source, sources)
    if not any(references):
        return Listing(source, None, entries, None)
    reference = _shared([one for one in references if one], url)
    found = {entry.key: entry for entry in _entries(reference, [one for one in references if one])}
    keys = (one.removeprefix(f"{reference}/") for one in references)
    partners = {entry.key: found.get(key) for entry, key in zip(entries, keys, strict=True)}
    return Listing(source, reference, entries, partners.get)


def _places(table: pa.Table, column: str, store: Store) -> list[str]:
    """Whole URLs, or whole paths where the list is local; empty for null."""
    home = store.url()
    places = [str(value).removeprefix("file://") if value else "" for value in table[column].to_pylist()]
    return [
        place if not place or "://" in place or place.startswith("/") else f"{home}/{posixpath.normpath(place)}"
        for place in places
    ]


def _shared(places: list[str], url: str) -> str:
    """The folder that all of them lie in."""
    protocols = {place.partition("://")[0] if "://" in place else "" for place in places}
    folders = {posixpath.dirname(place) for place in places}
    shared = posixpath.commonpath(folders) if len(protocols) == 1 else ""
    if not shared.replace(":", "").strip("/") or shared.rstrip("/").endswith(":"):
        raise StorageError(f"{url}: the files share no folder or bucket: make a list for each")
    return shared.replace(":/", "://", 1) if "://" in places[0] and "://" not in shared else shared


def _entries(folder: str, places: list[str]) -> list[Entry]:
    """In the order of the list; looked up by listing the folder they share once, or one by one on the web."""
    store = Store(folder)
    keys = [place.removeprefix(f"{folder}/") for place in places]
    if store.is_web:
        with ThreadPoolExecutor(_AT_ONCE) as threads:
            found = list(threads.map(store.entry, keys))
    else:
        there = {entry.key: entry for entry in store.list()}
        found = [there.get(key) for key in keys]
    return [entry or Entry(key, 0, "missing") for key, entry in zip(keys, found, strict=True)]
