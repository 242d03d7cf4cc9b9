"""What is wrong with a data set, before hours are spent on it: counts, partners, sizes, wrong folders, duplicates."""

import hashlib
import posixpath
import re
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate

from nafnet.conventions import PROTOCOLS
from nafnet.images import RefusedImage, UnreadableImage, decode
from pipelines.containers import Collection, open_collection
from pipelines.datasets import DataName, Found, find, matches, other_blur, partners, reference_key
from pipelines.storage import Entry, StorageError, Store

_OPENED = 12  # images that are read to learn their size in pixels
_NAMED = 5  # of a kind of finding
_READERS = 8
_HASHED_BYTES = 2_000_000_000  # read in search of copies: seconds from a disk
_MD5 = re.compile(r"[0-9a-f]{32}")  # as S3's etag of an object that came in one piece


@dataclass(frozen=True, slots=True)
class Findings:
    """What a check saw. `problems` keep the published number from being reproduced, `remarks` do not."""

    found: Found
    images: int
    expected: int | None
    megabytes: float
    sizes: tuple[tuple[str, int], ...]  # such as ("1280x720", 12): of the images that were opened
    problems: tuple[str, ...]
    remarks: tuple[str, ...]


def check(data: DataName, url: str, *, variant: str | None = None) -> Findings:
    """Look at a data set without restoring anything. A few images are opened, the rest is listed.

    Raises:
        StorageError: nothing there looks like the data set.
    """
    found = find(data, url, variant=variant)
    source = open_collection(found.source)
    everything = list(source.list())
    entries = [entry for entry in everything if matches(entry.key, found.include)]
    expected = PROTOCOLS[data].images
    problems, remarks = [], []
    if len(entries) != expected:
        problems.append(f"{len(entries)} images, the published mean is over {expected}")
    if empty := [entry.key for entry in entries if entry.size == 0]:
        problems.append(f"{len(empty)} files are empty: {_named(empty)}")
    few = _spread(entries)
    sizes = {entry.key: _size(source, entry) for entry in few}
    theirs: list[str] = []
    if found.reference is None:
        remarks.append("no references: images can be restored, not scored")
    else:
        collection = open_collection(found.reference)
        references = everything if found.reference == found.source else list(collection.list())
        problems += _unpaired(entries, references, found)
        theirs = _misfits(few, sizes, collection, partners(few, references, found.pair))
    doubles, skipped = _duplicates(source, entries)
    if doubles:
        # Blocks of 256 px may well be alike, all black or all white.
        (remarks if data == "sidd" else problems).append(
            f"{len(doubles)} images are copies of others: {_named(doubles)}"
        )
    if skipped:
        remarks.append(
            f"copies were looked for in the first {_HASHED_BYTES / 1e9:g} GB of images of equal size: "
            f"{skipped} more were not read"
        )
    if found.pair == "blur_gamma=sharp":
        problems.append("these are the images of blur_gamma: the published numbers are of blur")
    elif other_blur(found) is not None:
        remarks.append("blur_gamma is there, too, and left alone: the published numbers are of blur")
    if data == "gopro":
        problems += _train(found)
    if unreadable := [key for key, size in sizes.items() if size is None]:
        problems.append(f"{len(unreadable)} of {_OPENED} images that were opened cannot be read: {_named(unreadable)}")
    if theirs:
        problems.append(f"{len(theirs)} of their references are of another size or cannot be read: {_named(theirs)}")
    usual = {"gopro": "1280x720", "reds": "1280x720", "sidd": "256x256"}[data]
    known = Counter(size for size in sizes.values() if size is not None)
    if set(known) - {usual}:
        remarks.append(f"the published images are {usual} px: others were resized, cut, or are another set")
    return Findings(
        found=found,
        images=len(entries),
        expected=expected,
        megabytes=sum(entry.size for entry in entries) / 1e6,
        sizes=tuple(known.most_common()),
        problems=tuple(problems),
        remarks=tuple(remarks),
    )


def lines(findings: Findings) -> list[str]:
    """The findings as a person reads them."""
    found = findings.found
    sizes = ", ".join(f"{size} ({count})" for size, count in findings.sizes) or "none could be opened"
    text = [
        f"data set   {found.data}: {found.layout}",
        f"images     {found.source}: {findings.images} of {findings.expected}, {findings.megabytes:,.1f} MB",
        f"references {found.reference or 'none'}",
        f"opened     {sizes}",
    ]
    text += [f"problem    {problem}" for problem in findings.problems]
    text += [f"remark     {remark}" for remark in findings.remarks]
    text.append("verdict    " + ("not what was published" if findings.problems else "complete"))
    return text


def _unpaired(entries: list[Entry], references: list[Entry], found: Found) -> list[str]:
    pairs = partners(entries, references, found.pair)
    problems = []
    if lonely := [entry.key for entry, partner in zip(entries, pairs, strict=True) if partner is None]:
        problems.append(f"{len(lonely)} images have no reference: {_named(lonely)}")
    used = {partner.key for partner in pairs if partner is not None}
    extra = [entry.key for entry in references if entry.key not in used and _is_reference(entry.key, found)]
    if extra:
        problems.append(f"{len(extra)} references have no image: {_named(extra)}")
    return problems


def _misfits(
    entries: list[Entry], sizes: dict[str, str | None], references: Collection, pairs: list[Entry | None]
) -> list[str]:
    """Keys of the references that have another size than their image, or cannot be read."""
    return [
        pair.key
        for entry, pair in zip(entries, pairs, strict=True)
        if pair is not None and sizes[entry.key] is not None and _size(references, pair) != sizes[entry.key]
    ]


def _is_reference(key: str, found: Found) -> bool:
    """Whether a file beside the references is one that an image of the selection should have."""
    if found.pair is not None:
        old, _, new = found.pair.partition("=")
        image = reference_key(key, f"{new}={old}")
        return image is not None and matches(image, found.include)
    stem = posixpath.splitext(key)[0]
    return any(matches(stem + posixpath.splitext(glob)[1], (glob,)) for glob in found.include)


def _duplicates(source: Collection, entries: list[Entry]) -> tuple[list[str], int]:
    """Keys whose content another one before them has, and how many were not read to learn it.

    Only images of equal size can be copies. Where the store has no MD5 of them they are read, items of a container
    too; of blocks, the PNG files that they are read as are compared.
    """
    sizes = Counter(entry.size for entry in entries)
    alike = [entry for entry in entries if entry.size and sizes[entry.size] > 1]
    # an LMDB's or a tar's own etag is none of its items'
    known = {entry.key for entry in alike if isinstance(source, Store) and _MD5.fullmatch(entry.fingerprint)}
    planned = accumulate(0 if entry.key in known else entry.size for entry in alike)
    hashed = [
        entry for entry, total in zip(alike, planned, strict=True) if entry.key in known or total <= _HASHED_BYTES
    ]

    def mark(entry: Entry) -> str | None:
        if entry.key in known:
            return entry.fingerprint
        try:
            return hashlib.md5(source.read(entry.key), usedforsecurity=False).hexdigest()
        except _CANNOT_READ:  # which is said of the images that are opened
            return None

    with ThreadPoolExecutor(_READERS) as readers:
        marks = list(readers.map(mark, hashed))
    seen: set[str] = set()
    doubles = []
    for entry, found in zip(hashed, marks, strict=True):
        if found is None:
            continue
        if found in seen:
            doubles.append(entry.key)
        seen.add(found)
    return doubles, len(alike) - len(hashed)


def _train(found: Found) -> list[str]:
    """GoPro's training set lies beside the scored one, and is twice as large."""
    parts = found.source.split("/")
    return ["this is the training part: the scored one is called test"] if "train" in parts[-2:] else []


_CANNOT_READ = (UnreadableImage, RefusedImage, FileNotFoundError, StorageError)


def _spread(entries: list[Entry]) -> list[Entry]:
    """The few that are opened."""
    return entries[:: max(1, -(-len(entries) // _OPENED))]


def _size(collection: Collection, entry: Entry) -> str | None:
    """In px, such as 1280x720; None for what cannot be read."""
    try:
        picture = decode(collection.read(entry.key))
    except _CANNOT_READ:
        return None
    return f"{picture.width}x{picture.height}"


def _named(keys: Iterable[str]) -> str:
    keys = list(keys)
    return ", ".join(keys[:_NAMED]) + (f" and {len(keys) - _NAMED} more" if len(keys) > _NAMED else "")
