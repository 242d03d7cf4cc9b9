"""Images of any collection as tar shards, the way WebDataset reads them."""

import io
import posixpath
import tarfile
from collections import Counter
from collections.abc import Iterator

from pipelines.containers import Collection, open_collection
from pipelines.datasets import IMAGES, matches
from pipelines.storage import StorageError, Store


def pack(source: str, output: str, *, name: str = "shard", shard_images: int = 1000) -> Iterator[tuple[str, int]]:
    """Write `name`-000000.tar and so on below `output`, in order of keys; yields each shard's URL and image count.

    A sample's name is its key without extension, '/' written as '_' and dots of the name as '-', since WebDataset
    ends a name at its first dot. The same images give the same shards; a shard is written whole or not at all.

    Raises:
        StorageError: there are no images, or two of them would have one name.
    """
    collection, store = open_collection(source), Store(output)
    keys = [entry.key for entry in collection.list() if matches(entry.key, IMAGES)]
    if not keys:
        raise StorageError(f"no images in {collection.url()}")
    names = [member_name(key) for key in keys]
    if double := next((one for one, count in Counter(names).items() if count > 1), None):
        both = [key for key, one in zip(keys, names, strict=True) if one == double]
        raise StorageError(f"{' and '.join(both)} would both be called {double}: rename one")
    for shard, start in enumerate(range(0, len(keys), shard_images)):
        place = f"{name}-{shard:06d}.tar"
        store.write(place, _tar(collection, keys[start : start + shard_images]))
        yield store.url(place), len(keys[start : start + shard_images])


def member_name(key: str) -> str:
    """What an image is called in a shard."""
    stem, ending = posixpath.splitext(key)
    return stem.replace("/", "_").replace(".", "-") + ending.lower()


def _tar(collection: Collection, keys: list[str]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for key in keys:
            data = collection.read(key)
            member = tarfile.TarInfo(member_name(key))
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return file.getvalue()
