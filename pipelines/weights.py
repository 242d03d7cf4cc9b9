"""From what a person names as checkpoint (a file, a URL, a catalog name) to a file on this machine."""

import hashlib
import os
from pathlib import Path

from nafnet import catalog
from nafnet.checkpoint import CheckpointError


def cache_folder() -> Path:
    """Where fetched checkpoints are kept: NAFNET_CACHE, else ~/.cache/nafnet."""
    return Path(os.environ.get("NAFNET_CACHE") or Path.home() / ".cache" / "nafnet")


def locate(checkpoint: str) -> Path:
    """A local file for `checkpoint`, fetched into the cache first when it is a URL or a published name.

    Raises:
        CheckpointError: it is neither a file nor a known name, or could not be fetched.
    """
    entry = catalog.CATALOG.get(checkpoint)
    if entry is not None and (bundled := entry.bundled_path()):
        return bundled
    if "://" in checkpoint:
        name = hashlib.sha256(checkpoint.encode()).hexdigest()[:16] + "-" + checkpoint.rpartition("/")[2]
        return _fetch(checkpoint, cache_folder() / name, None)
    if entry is None:
        path = Path(checkpoint).expanduser().absolute()
        if not path.is_file():
            known = ", ".join(catalog.CATALOG)
            raise CheckpointError(f"no checkpoint at {path}, and no catalog entry of that name; it has {known}")
        return path
    target = cache_folder() / entry.file
    if target.is_file():
        return target
    if entry.url is None:
        raise CheckpointError(
            f"{entry.name}: no public copy is known: fetch {entry.file} from the authors' page "
            f"(github.com/megvii-research/NAFNet) and put it at {target}"
        )
    try:
        return _fetch(entry.url, target, entry.sha256)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}. Without network: put {entry.file} (SHA-256 {entry.sha256}) at {target}, or give its path"
        ) from error


def _fetch(url: str, target: Path, sha256: str | None) -> Path:
    if target.is_file():
        return target
    # Here, not above: the model library alone, without fsspec, must still find files and bundled weights.
    from pipelines.storage import StorageError, open_url  # noqa: PLC0415

    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        store, name = open_url(url)
        data = store.read(name)
        if sha256 and hashlib.sha256(data).hexdigest() != sha256:
            raise StorageError(f"it holds {len(data)} bytes of another SHA-256")
        part.write_bytes(data)
    except Exception as error:  # every fsspec backend has its own
        part.unlink(missing_ok=True)
        raise CheckpointError(f"could not fetch {url}: {type(error).__name__}: {error}") from error
    part.replace(target)
    return target
