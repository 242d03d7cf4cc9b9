"""Scoring what is already there: one folder against another."""

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context

from nafnet.conventions import Convention
from nafnet.images import RefusedImage, UnreadableImage, decode
from nafnet.metrics import Scores, score
from pipelines.containers import open_collection
from pipelines.datasets import IMAGES, matches, partners
from pipelines.storage import StorageError


@dataclass(frozen=True, slots=True)
class Scored:
    """One image: its scores, or why it has none."""

    key: str
    scores: Scores | None
    reason: str | None = None


def score_folders(restored: str, reference: str, convention: Convention) -> Iterator[Scored]:
    """Score every image file below `restored` against its reference, in order of their keys, on all cores.

    Raises:
        StorageError: a folder is not there or is empty.
    """
    images, references = open_collection(restored), open_collection(reference)
    entries = [entry for entry in images.list() if matches(entry.key, IMAGES)]
    if not entries:
        raise StorageError(f"nothing to score in {images.url()}")
    pairs = zip(entries, partners(entries, list(references.list())), strict=True)
    jobs = [(entry.key, partner.key if partner else None) for entry, partner in pairs]
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as workers:
        yield from workers.map(partial(_score_one, restored, reference, convention), jobs, chunksize=4)


def _score_one(restored: str, reference: str, convention: Convention, job: tuple[str, str | None]) -> Scored:
    key, partner = job
    if partner is None:
        return Scored(key, None, f"no reference of that name in {reference}")
    try:
        image = decode(open_collection(restored).read(key)).pixels
        original = decode(open_collection(reference).read(partner)).pixels
        return Scored(key, score(image, original, convention))
    except (UnreadableImage, RefusedImage, ValueError) as error:
        return Scored(key, None, str(error))
