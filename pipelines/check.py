"""What is wrong with a data set, before hours are spent on it: counts, partners, sizes, wrong folders, duplicates."""

import hashlib
import posixpath
from collections import Counter, defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from nafnet.conventions import PROTOCOLS
from nafnet.images import RefusedImage, UnreadableImage, decode
from pipelines.containers import Collection, open_collection
from pipelines.datasets import DataName, Found, find, matches, other_blur, partners, reference_key
from pipelines.storage import Entry, StorageError, Store

_OPENED = 12  # images that are read to learn their size in pixels
_NAMED = 5  # of a kind of finding
_READERS = 8


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
    if found.reference is None:
        remarks.append("no references: images can be restored, not scored")
    else:
        references = everything if found.reference == found.source else list(open_collection(found.reference).list())
        problems += _unpaired(entries, references, found)
    if doubles := _duplicates(source, entries):
        problems.append(f"{len(doubles)} images are copies of others: {_named(doubles)}")
    if found.pair == "blur_gamma=sharp":
        problems.append("these are the images of blur_gamma: the published numbers are of blur")
    elif other_blur(found) is not None:
        remarks.append("blur_gamma is there, too, and left alone: the published numbers are of blur")
    if data == "gopro":
        problems += _train(found)
    sizes, unreadable = _sizes(source, entries)
    if unreadable:
        problems.append(f"{len(unreadable)} of {_OPENED} images that were opened cannot be read: {_named(unreadable)}")
    usual = {"gopro": "1280x720", "reds": "1280x720", "sidd": "256x256"}[data]
    if set(sizes) - {usual}:
        remarks.append(f"the published images are {usual} px: others were resized, cut, or are another set")
    return Findings(
        found=found,
        images=len(entries),
        expected=expected,
        megabytes=sum(entry.size for entry in entries) / 1e6,
        sizes=tuple(sizes.most_common()),
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


def _is_reference(key: str, found: Found) -> bool:
    """Whether a file beside the references is one that an image of the selection should have."""
    if found.pair is not None:
        old, _, new = found.pair.partition("=")
        image = reference_key(key, f"{new}={old}")
        return image is not None and matches(image, found.include)
    stem = posixpath.splitext(key)[0]
    return any(matches(stem + posixpath.splitext(glob)[1], (glob,)) for glob in found.include)


def _duplicates(source: Collection, entries: list[Entry]) -> list[str]:
    """Keys whose content another one before them has: by checksum in a bucket, else those of one size are read."""
    groups: dict[object, list[Entry]] = defaultdict(list)
    for entry in entries:
        groups[entry.size].append(entry)
    alike = [entry for group in groups.values() if len(group) > 1 for entry in group if entry.size]
    if not isinstance(source, Store):
        return []  # items of one container have no checksums of their own, and blocks are all of one size
    if not source.is_local and len({entry.fingerprint for entry in entries}) > 1:
        marks = [entry.fingerprint for entry in alike]
    else:
        with ThreadPoolExecutor(_READERS) as readers:
            marks = list(readers.map(lambda entry: hashlib.sha256(source.read(entry.key)).hexdigest(), alike))
    seen: set[str] = set()
    doubles = []
    for entry, mark in zip(alike, marks, strict=True):
        if mark in seen:
            doubles.append(entry.key)
        seen.add(mark)
    return doubles


def _train(found: Found) -> list[str]:
    """GoPro's training set lies beside the scored one, and is twice as large."""
    parts = found.source.split("/")
    return ["this is the training part: the scored one is called test"] if "train" in parts[-2:] else []


def _sizes(source: Collection, entries: list[Entry]) -> tuple[Counter[str], list[str]]:
    """Sizes in px of a few images spread over the set, and the keys of those that cannot be read."""
    chosen = entries[:: max(1, -(-len(entries) // _OPENED))]
    sizes, unreadable = Counter[str](), []
    for entry in chosen:
        try:
            picture = decode(source.read(entry.key))
        except (UnreadableImage, RefusedImage, FileNotFoundError, StorageError):
            unreadable.append(entry.key)
            continue
        sizes[f"{picture.width}x{picture.height}"] += 1
    return sizes, unreadable


def _named(keys: Iterable[str]) -> str:
    keys = list(keys)
    return ", ".join(keys[:_NAMED]) + (f" and {len(keys) - _NAMED} more" if len(keys) > _NAMED else "")
