"""Which reference belongs to which degraded image."""

import posixpath
from collections.abc import Callable, Iterable

from pipelines.storage import Entry


def same_key(references: Iterable[Entry]) -> Callable[[str], Entry | None]:
    """Pair folders by relative key: the same one, else the only one that differs in its extension alone.

    Returns a function from a degraded image's key to its reference's entry, or None when there is none (or several).
    """
    by_key: dict[str, Entry] = {}
    by_stem: dict[str, Entry | None] = {}
    for entry in references:
        by_key[entry.key] = entry
        stem = posixpath.splitext(entry.key)[0]
        by_stem[stem] = entry if stem not in by_stem else None  # two candidates: neither is certain

    def find(key: str) -> Entry | None:
        return by_key.get(key) or by_stem.get(posixpath.splitext(key)[0])

    return find
