"""What this machine has and can do for a run, checked by doing it; each finding says what to do when it is bad."""

import os
import platform
import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import numpy as np
import torch
from packaging.requirements import Requirement

from nafnet import catalog
from nafnet.checkpoint import CheckpointError
from nafnet.images import Picture, decode, encode
from nafnet.memory import available_bytes
from nafnet.restore import has_arithmetic
from pipelines.cache import cache_folder
from pipelines.storage import Store
from pipelines.weights import locate

_PACKAGE = "nafnet-pipelines"
_LEAST_FREE_BYTES = 5 * 2**30  # of disk: weights, Ray's spilled objects, expanded MATLAB arrays
_LEAST_MEMORY_BYTES = 4 * 2**30  # of a machine: the network at 1280x720 px takes 1.5
_FAST_ON_GPU = {"float32": (0, 0), "float16": (5, 3), "TF32": (8, 0), "bf16": (8, 0)}  # from which compute capability
_SLOW_SECONDS = 0.2  # to encode and decode 1280x720 px


class Level(StrEnum):
    """How bad a finding is: `BAD` stops a run, `WARN` makes one slower or less than it could be."""

    OK = "ok"
    WARN = "warn"
    BAD = "bad"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the doctor's: what was looked at, what was found, what to do."""

    what: str
    level: Level
    found: str
    advice: str = ""


def machine() -> Iterator[Finding]:
    """Python, packages, memory, disk, devices, codecs and the weights' cache of this machine."""
    for check in (_python, _packages, _memory, _disk, _devices, _codecs, _weights):
        yield from check()


def storage(url: str) -> Iterator[Finding]:
    """List, write, read and delete a small object at `url`."""
    what = f"storage {url}"
    key, content = f".{uuid.uuid4().hex}.probe", b"nafnet doctor"
    steps: list[tuple[str, Callable[[Store], object]]] = [
        ("write", lambda store: store.write(key, content)),
        ("read", lambda store: _same(store.read(key), content)),
        ("list", lambda store: next(store.list())),
        ("delete", lambda store: store.delete(key)),
    ]
    done: list[str] = []
    try:
        store = Store(url)
        for name, step in steps:
            step(store)
            done.append(name)
    except Exception as error:  # noqa: BLE001 - every backend has its own
        failed = steps[len(done)][0]
        able = f"can {', '.join(done)}; " if done else ""
        advice = "check the bucket, the endpoint, the credentials and their permissions (AWS_*, or --storage)"
        yield Finding(what, Level.BAD, f"{able}cannot {failed}: {error}", advice)
        return
    yield Finding(what, Level.OK, f"can {', '.join(done)}")


def _same(found: bytes, content: bytes) -> None:
    if found != content:
        raise ValueError("another content came back")


def _python() -> Iterator[Finding]:
    found = f"{platform.python_version()} at {sys.executable}"
    wanted = (3, 11) <= sys.version_info[:2] < (3, 14)
    yield Finding("Python", Level.OK if wanted else Level.BAD, found, "" if wanted else "use Python 3.11 to 3.13")


def _packages() -> Iterator[Finding]:
    wrong, seen = [], []
    for line in requires(_PACKAGE) or []:
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate({"extra": "pipelines"}):
            continue
        try:
            there = version(requirement.name)
        except PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        seen.append(f"{requirement.name} {there}")
        if not requirement.specifier.contains(there, prereleases=True):
            wrong.append(f"{requirement.name} {there} is not {requirement.specifier}")
    telling = [text for text in seen if text.split()[0] in {"torch", "ray", "prefect", "pyarrow", "s3fs"}]
    advice = "pip install --constraint infra/constraints.txt 'nafnet-pipelines[pipelines]'"
    if wrong:
        yield Finding("packages", Level.BAD, "; ".join(wrong), advice)
    else:
        yield Finding("packages", Level.OK, ", ".join(telling))


def _memory() -> Iterator[Finding]:
    there = available_bytes(share=1.0)
    enough = there >= _LEAST_MEMORY_BYTES
    advice = "" if enough else "set --tile 512 and --actors 1, or use a larger machine"
    yield Finding("memory", Level.OK if enough else Level.WARN, f"{_gigabytes(there)} for actors", advice)


def _disk() -> Iterator[Finding]:
    places = {"temporary files": Path(tempfile.gettempdir()), "weights' cache": _existing(cache_folder())}
    for name, place in places.items():
        free = shutil.disk_usage(place).free
        enough = free >= _LEAST_FREE_BYTES
        advice = "" if enough else "make room, or set TMPDIR or NAFNET_CACHE to another disk"
        level = Level.OK if enough else Level.WARN
        yield Finding(f"disk for {name}", level, f"{_gigabytes(free)} free at {place}", advice)


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def _devices() -> Iterator[Finding]:
    fast = [name for name in ("float32", "bf16", "float16") if has_arithmetic(name)]
    found = f"{os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}, arithmetic in {', '.join(fast)}"
    yield Finding("CPU", Level.OK, found)
    if not torch.cuda.is_available():
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
        yield Finding("GPU", Level.OK, f"none: {built}")
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        name, capability = torch.cuda.get_device_name(i), torch.cuda.get_device_capability(i)
        known = ", ".join(word for word, least in _FAST_ON_GPU.items() if capability >= least)
        found = (
            f"{name}, compute {'.'.join(map(str, capability))}, {_gigabytes(free)} of {_gigabytes(total)} free, "
            f"arithmetic in {known}"
        )
        yield Finding(f"GPU {i}", Level.OK, found)


def _codecs() -> Iterator[Finding]:
    rng = np.random.default_rng(0)
    pixels = np.cumsum(rng.integers(-3, 4, (720, 1280, 3)), axis=1).astype(np.uint8)
    for name in ("PNG", "JPEG"):
        started = time.perf_counter()
        data = encode(Picture(pixels, name))
        encoded = time.perf_counter()
        decode(data)
        times = encoded - started, time.perf_counter() - encoded
        slow = sum(times) > _SLOW_SECONDS
        found = f"1280x720 px written in {times[0] * 1e3:.0f} ms, read in {times[1] * 1e3:.0f} ms"
        advice = "something else uses this machine, or imagecodecs is a slow build" if slow else ""
        yield Finding(f"{name} codec", Level.WARN if slow else Level.OK, found, advice)


def _weights() -> Iterator[Finding]:
    folder, good = cache_folder(), list[str]()
    for entry in catalog.CATALOG.values():
        if not (folder / entry.file).is_file():
            continue
        try:
            locate(entry.name)
            good.append(entry.name)
        except CheckpointError as error:
            found = str(error).partition("\n")[0]
            yield Finding(f"weights {entry.name}", Level.BAD, found, "delete it: it is fetched again")
    yield Finding("weights", Level.OK, f"bundled: demo; in {folder}: {', '.join(good) or 'none'}")


def _gigabytes(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
