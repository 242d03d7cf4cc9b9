"""Walking a remote tree in order: the next folders and pages are asked for while the present one is handed out."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Generic, TypeVar

T = TypeVar("T")

_AT_ONCE = 16  # requests under way
_AHEAD = 8  # folders of one level that are asked for before their turn: bounds what is held


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """A part of one folder.

    `items` are sorted (key, what is known of it), all after those of the page before; None is a folder, whose key ends
    in '/'. `more` is what the server wants to hear for the next page; None after the last.
    """

    items: list[tuple[str, T | None]]
    more: str | None = None


Fetch = Callable[[str, str | None], Page[T]]
"""Takes a folder ('' or 'a/b/') and `more` of its page before."""


def walk(fetch: Fetch[T]) -> Iterator[tuple[str, T]]:
    """Every file below the folder '', sorted by key, with a few pages in memory."""
    pool = ThreadPoolExecutor(_AT_ONCE, "listing")
    try:
        entered = [_level(pool, fetch, "", pool.submit(fetch, "", None))]
        while entered:
            for key, found in entered[-1]:
                if isinstance(found, Future):
                    entered.append(_level(pool, fetch, key, found))
                    break
                yield key, found
            else:
                entered.pop()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _level(
    pool: ThreadPoolExecutor, fetch: Fetch[T], folder: str, first: "Future[Page[T]]"
) -> "Iterator[tuple[str, T | Future[Page[T]]]]":
    """What one folder holds; its own folders with their first page, which is on its way."""
    following: Future[Page[T]] | None = first
    while following is not None:
        page = following.result()
        following = pool.submit(fetch, folder, page.more) if page.more else None
        folders = (key for key, found in page.items if found is None)
        ahead = deque(pool.submit(fetch, key, None) for key in islice(folders, _AHEAD))
        for key, found in page.items:
            if found is not None:
                yield key, found
                continue
            ahead.extend(pool.submit(fetch, upcoming, None) for upcoming in islice(folders, 1))
            yield key, ahead.popleft()
