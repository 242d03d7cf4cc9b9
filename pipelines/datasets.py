"""Where GoPro, SIDD and REDS keep degraded and sharp images, and which reference belongs to which image.

A data set is read as it is distributed: what is found below a URL becomes the `source`, `reference`, `include` and
`pair` of an ordinary job.
"""

import posixpath
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import translate
from functools import lru_cache, partial
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.listing import mapped
from pipelines.storage import Entry, StorageError, Store, readable

DataName = Literal["gopro", "sidd", "reds"]

IMAGES = ("*.png", "*.jpg", "*.jpeg", "*.tif", "*.tiff", "*.webp", "*.bmp")


@dataclass(frozen=True, slots=True)
class Found:
    """A data set that was found: what a job needs to read it. `layout` says in words how it is laid out."""

    data: DataName
    layout: str
    source: str
    reference: str | None
    include: tuple[str, ...] = IMAGES
    pair: str | None = None


@dataclass(frozen=True, slots=True)
class _Layout:
    """One way in which a data set is distributed: relative names, with stars, that must all be there.

    `source` and `reference` are relative to where it was found; `variant` is chosen by name, never by default.
    """

    words: str
    marks: tuple[str, ...]
    source: str
    reference: str | None
    include: tuple[str, ...] = IMAGES
    pair: str | None = None
    variant: str | None = None


_LAYOUTS: dict[DataName, tuple[_Layout, ...]] = {
    "gopro": (
        _Layout("LMDB folders", ("input.lmdb", "target.lmdb"), "input.lmdb", "target.lmdb"),
        _Layout("flat folders", ("input", "target"), "input", "target"),
        _Layout("tree of sequences", ("GOPR*/blur", "GOPR*/sharp"), "", "", ("*/blur/*.png",), "blur=sharp"),
        _Layout(
            "tree of sequences, blur_gamma",
            ("GOPR*/blur_gamma", "GOPR*/sharp"),
            "",
            "",
            ("*/blur_gamma/*.png",),
            "blur_gamma=sharp",
            variant="gamma",
        ),
        _Layout("tar shards", ("*.tar",), "*.tar", "*.tar", ("*.input.png",), ".input.=.target."),
    ),
    "sidd": (
        _Layout(
            "MATLAB blocks",
            ("ValidationNoisyBlocksSrgb.mat", "ValidationGtBlocksSrgb.mat"),
            "ValidationNoisyBlocksSrgb.mat",
            "ValidationGtBlocksSrgb.mat",
        ),
        _Layout("LMDB folders", ("input_crops.lmdb", "gt_crops.lmdb"), "input_crops.lmdb", "gt_crops.lmdb"),
        _Layout(
            "MATLAB blocks of the benchmark, without references",
            ("BenchmarkNoisyBlocksSrgb.mat",),
            "BenchmarkNoisyBlocksSrgb.mat",
            None,
            variant="benchmark",
        ),
    ),
    "reds": (
        # val-300: of each sequence's hundred frames those whose number ends in 9
        _Layout("folders", ("val_blur_jpeg", "val_sharp"), "val_blur_jpeg", "val_sharp", ("*9.jpg",)),
        _Layout("LMDB folders", ("blur_300.lmdb", "sharp_300.lmdb"), "blur_300.lmdb", "sharp_300.lmdb"),
    ),
}
DATA_SETS: tuple[DataName, ...] = get_args(DataName)
_BELOW = ("", "test", "val")  # where the scored part may lie


def find(data: DataName, url: str, *, variant: str | None = None) -> Found:
    """Find the scored part of data set `data` (of `DATA_SETS`) at or just below `url`.

    `variant` asks for what is not the usual one: "gamma" for GoPro's other blur, "benchmark" for SIDD's blocks
    without references.

    Raises:
        StorageError: nothing at `url` looks like it; says what was looked for and what is there.
    """
    store = Store(url)
    store.check_folder()
    choices = [layout for layout in _LAYOUTS[data] if layout.variant == variant]
    if not choices:
        known = [layout.variant for layout in _LAYOUTS[data] if layout.variant]
        raise ValueError(f"{data} has no variant {variant!r}" + (f": there is {', '.join(known)}" if known else ""))
    for below in _BELOW:
        for layout in choices:
            if _lies(layout, store, below):
                names = (layout.source, layout.reference)
                source, reference = (None if name is None else _url(store, below, name) for name in names)
                return Found(data, layout.words, source or "", reference, layout.include, layout.pair)
    for layout in _LAYOUTS[data]:
        if layout not in choices and any(_lies(layout, store, below) for below in _BELOW):
            how = f"ask for it with --variant {layout.variant}" if layout.variant else "leave out --variant"
            raise StorageError(
                f"{store.url()} holds {data} as {layout.words} ({', '.join(layout.marks)}) alone, which is not what "
                f"{'the published numbers are of' if layout.variant else 'was asked for'}: {how}"
            )
    looked = "; ".join(f"{layout.words} ({', '.join(layout.marks)})" for layout in choices)
    there = store.names("*")
    listed = ", ".join(there[:10]) + (f" and {len(there) - 10} more" if len(there) > 10 else "")
    other = next((name for name in DATA_SETS if name != data and _is(name, store)), None)
    raise StorageError(
        f"no {data} data set at {store.url()}, nor in its test/ or val/. Looked for {looked}. There is: "
        f"{listed or 'nothing'}" + (f". That looks like {other}" if other else "")
    )


def other_blur(found: Found) -> dict[str, Any] | None:
    """What a job needs to read GoPro's other blur, for a tree that has both; None elsewhere."""
    folders = [(layout.marks[0].partition("/")[2], layout) for layout in _LAYOUTS["gopro"] if layout.pair == found.pair]
    other = {"blur": "gamma", "blur_gamma": None}
    if found.data != "gopro" or not folders or folders[0][0] not in other:
        return None
    try:
        there = find("gopro", found.source, variant=other[folders[0][0]])
    except StorageError:
        return None
    return {"include": there.include, "pair": there.pair}


def _is(data: DataName, store: Store) -> bool:
    return any(_lies(layout, store, below) for below in _BELOW for layout in _LAYOUTS[data])


def _lies(layout: _Layout, store: Store, below: str) -> bool:
    """Whether all of a layout's marks are in this folder of the store."""
    paths = [posixpath.join(below, mark) for mark in layout.marks]
    return all(store.names(path) if "*" in path else store.exists(path) for path in paths)


def _url(store: Store, *parts: str) -> str:
    tail = posixpath.join(*parts).strip("/")
    return f"{store.url()}/{tail}" if tail else store.url()


def partners(entries: Iterable[Entry], references: Sequence[Entry], rule: str | None = None) -> list[Entry | None]:
    """The reference of each entry, None where there is none (or several); `partner_places` says how it is found."""
    keys, theirs = (pa.array([readable(one.key) for one in those], pa.string()) for those in (entries, references))
    places = partner_places(keys, theirs, rule).to_pylist()
    return [None if place is None else references[place] for place in places]


def partner_places(keys: pa.ChunkedArray, references: pa.ChunkedArray, rule: str | None = None) -> pa.ChunkedArray:
    """Where in `references` (keys, no two alike) the partner of each key stands, int32; null where there is none.

    Pairs by relative key: the same one, else the only one that differs in its extension alone. With a rule `old=new`
    the reference's key is the image's with the folder `old` called `new`, or where no folder of the key is called so,
    with that part of its last name replaced; a key without `old` has no reference.
    """
    named = keys if rule is None else mapped(keys, partial(reference_key, rule=rule))
    places = pc.index_in(named, value_set=references)
    if places.null_count == 0:
        return places
    stems = mapped(references, _stem).combine_chunks().dictionary_encode()
    codes = stems.indices.to_numpy()
    only = np.full(len(stems.dictionary), -1, np.int32)
    only[codes] = np.arange(len(codes), dtype=np.int32)
    only[np.bincount(codes) > 1] = -1  # two candidates: neither is certain
    found = pc.index_in(mapped(named, _stem), value_set=stems.dictionary)
    by_stem = pa.array(only, mask=only < 0).take(found)
    return pc.coalesce(places, by_stem)


def _stem(key: str) -> str:
    return posixpath.splitext(key)[0]


def reference_key(key: str, rule: str) -> str | None:
    """The key of the reference under a rule `old=new`; None for a key that the rule does not fit."""
    old, _, new = rule.partition("=")
    *folders, name = key.split("/")
    if old in folders:
        renamed = [new if folder == old else folder for folder in folders]
        return "/".join([*(folder for folder in renamed if folder), name])
    if old in name:
        return "/".join([*folders, name.replace(old, new)])
    return None


def matches(key: str, globs: Iterable[str]) -> bool:
    """Whether one of the globs fits the whole key or its last part, without regard to upper and lower case."""
    fits = _pattern(tuple(globs)).match
    lower = key.lower()
    return bool(fits(lower) or fits(lower.rpartition("/")[2]))


@lru_cache
def _pattern(globs: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(translate(glob.lower()) for glob in globs) or r"(?!)")
