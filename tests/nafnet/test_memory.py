"""Planned memory against what processes really take, and what counts as running out of it."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest
import torch

from nafnet import memory, restore
from nafnet.memory import (
    LADDER,
    available_bytes,
    is_out_of_memory,
    make_room,
    network_bytes,
    process_bytes,
    resident_bytes,
    rungs,
    weights_bytes,
)
from nafnet.model import NetConfig
from nafnet.recipe import Recipe, Step
from nafnet.restore import Restorer, has_arithmetic
from tests.nafnet.test_strips import network_of

# Prints the peak of a process in bytes: argv is width, height, image width, tile or "whole", precision.
_PROGRAM = """
import sys
import numpy as np, torch
from nafnet import NetConfig, Network, Recipe, Restorer, Step
from tests.peak import peak_bytes
width, height, columns = map(int, sys.argv[1:4])
tile = int(sys.argv[4]) if sys.argv[4].isdecimal() else sys.argv[4]
torch.set_num_threads(2)
network = Network(NetConfig(width=width, enc_blocks=(1, 1, 1, 2))).eval()
restorer = Restorer([network], Recipe((Step("w"),), tile=tile, precision=sys.argv[5]))
restorer(np.zeros((height, columns, 3), np.uint8))
print(peak_bytes())
"""


@pytest.mark.parametrize(
    ("width", "size", "tile", "precision"),
    [
        (32, (720, 1280), None, "float32"),
        (16, (900, 1500), 640, "float32"),
        (64, (300, 400), None, "float32"),
        (32, (1000, 1600), None, "bf16"),
        (32, (1000, 1600), None, "float16"),
    ],
)
def test_the_plan_covers_the_peak_and_little_more(width, size, tile, precision):
    if not has_arithmetic(precision):
        pytest.skip(f"this processor does not compute in {precision}")
    config = NetConfig(width=width, enc_blocks=(1, 1, 1, 2))
    arguments = [str(width), *map(str, size), str(tile or "whole"), precision]
    run = subprocess.run([sys.executable, "-c", _PROGRAM, *arguments], capture_output=True, text=True, check=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        planned = process_bytes([config], *size, tile=tile, precision=precision)
    finally:
        torch.set_num_threads(threads)
    assert 0.5 * planned < int(run.stdout) <= planned


def test_the_plan_grows_with_pixels_and_precision():
    wide = NetConfig(width=32)
    none, photo = (network_bytes(wide, *size) for size in ((0, 0), (720, 1280)))
    assert network_bytes(wide, 1440, 1280) - none == pytest.approx(2 * (photo - none), rel=0.01)
    assert network_bytes(wide, 720, 1280, precision="bf16") < 0.8 * photo
    assert network_bytes(wide, 720, 1280, device="cuda") > photo
    assert network_bytes(wide, 705, 1265) == photo  # padded to a multiple of 16
    assert weights_bytes([wide]) == 4 * 17_111_907
    assert weights_bytes([wide, wide], precision="bf16") == 2 * 6 * 17_111_907


def test_the_ladder_goes_down_from_the_whole_image_or_a_tile():
    assert tuple(sorted(LADDER, reverse=True)) == LADDER
    assert rungs(3000, 2000, least=600) == [None, 2048, 1536, 1024, 768, 640]
    assert rungs(3000, 2000, least=600, first=900) == [900, 768, 640]
    assert rungs(500, 400, least=500) == [None]


def test_a_share_of_what_is_there():
    assert 2**28 < available_bytes() < 2**50
    assert available_bytes(share=0.25) == pytest.approx(available_bytes() / 4, abs=4)


def test_only_memory_counts_as_out_of_memory():
    with pytest.raises(RuntimeError) as refused:
        torch.empty(2**50, dtype=torch.uint8)
    assert is_out_of_memory(refused.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(MemoryError())
    with pytest.raises(RuntimeError) as shapes:
        torch.zeros(2) @ torch.zeros(3)
    assert not is_out_of_memory(shapes.value)
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))


# Restores an image that needs more memory than the process may have: argv is that in bytes, above what it holds.
_SHORT = """
import resource, sys
import numpy as np, torch
from nafnet import NetConfig, Network, Recipe, Restorer, Step
torch.set_num_threads(1)
torch.manual_seed(0)
network = Network(NetConfig(width=16, enc_blocks=(1,), middle_blocks=1, dec_blocks=(1,))).eval()
restorer = Restorer([network], Recipe((Step("w", train_size=32),), halo=32), memory=2**60)
image = np.random.default_rng(0).integers(0, 256, (2000, 1800, 3), np.uint8)
restorer(image[:600, :600])
held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + int(sys.argv[1]),) * 2)
restored = restorer.restore(image)
print(restored.tile, restored.note, restored.suspect, sep="|")
"""


@pytest.mark.parametrize(
    ("spare", "said"),
    [(3 * 10**9, "None|None|None"), (4 * 10**8, "1024|out of memory with tiles of 1536 px|None")],
    ids=["enough", "short"],
)
def test_memory_that_runs_out_means_smaller_tiles(spare, said):
    run = subprocess.run([sys.executable, "-c", _SHORT, str(spare)], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == said


def test_a_large_image_stays_within_what_it_may_use():
    """Scaled down from 100 megapixels: auto takes tiles where the whole image would need more."""
    memory = 1_300_000_000
    restorer = Restorer([network_of(NetConfig(width=16))], Recipe((Step("w"),)), memory=memory)
    tile = restorer.tile(3000, 4000)
    assert tile is not None
    assert restorer.process_bytes(3000, 4000, tile) <= memory < restorer.process_bytes(3000, 4000, None)
    larger = [side for side in LADDER if tile < side < 4000]
    assert all(restorer.process_bytes(3000, 4000, side) > memory for side in larger)


# Prints how many bytes live on the heap after 60 images and after 120, each of a size of its own.
_SIZES = """
import ctypes, random
import numpy as np
from nafnet import NetConfig, Network, Recipe, Restorer, Step
names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"  # of mallinfo2(3)
Info = type("Info", (ctypes.Structure,), {"_fields_": [(name, ctypes.c_size_t) for name in names.split()]})
libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Info
network = Network(NetConfig(width=8, enc_blocks=(1, 1), middle_blocks=1, dec_blocks=(1, 1))).eval()
restorer = Restorer([network], Recipe((Step("w"),), tile="whole"))
draw = random.Random(0)
for count in range(1, 121):
    restorer(np.zeros((draw.randint(16, 300), draw.randint(16, 300), 3), np.uint8))
    if count in (60, 120):
        print(libc.mallinfo2().uordblks)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks glibc")
def test_images_of_many_sizes_leave_no_more_behind_than_of_some():
    clean = {name: value for name, value in os.environ.items() if "CACHE_CAPACITY" not in name}  # as of this process
    run = subprocess.run([sys.executable, "-c", _SIZES], env=clean, capture_output=True, text=True, check=True)
    some, many = map(int, run.stdout.split())
    assert many < some + 20 * 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel")
def test_free_memory_goes_back_where_more_than_planned_would_be_held():
    pieces = [bytearray(2**16) for _ in range(2000)]  # too small to have been mapped one by one
    for piece in pieces:
        piece[::4096] = b"x" * 16
    keep = pieces[::100]  # what is free lies between
    del pieces, piece
    held = resident_bytes()
    make_room(0, 2**40, 1)
    assert resident_bytes() > held - 2**24
    make_room(2**40, 0, 1)
    assert resident_bytes() < held - 2**26
    assert len(keep) == 20


def test_room_is_made_where_the_size_changes_and_more_than_planned_would_be_held(monkeypatch):
    trims = []
    monkeypatch.setattr(memory, "_trim", trims.append)
    restorer = Restorer([network_of(NetConfig(width=8))], Recipe((Step("w"),), tile="whole"))
    small, large = (restorer.process_bytes(side, side, None) for side in (64, 128))
    idle = memory._LIBRARIES_BYTES
    for held, sides, made in (
        (idle, (128, 64, 128), 0),
        (large, (128, 128, 64, 64, 128), 2),
        (idle + large - small, (64, 128), 1),  # the small one has room, in what the largest would take
    ):
        monkeypatch.setattr(memory, "resident_bytes", lambda held=held: held)
        trims.clear()
        for side in sides:
            restorer(np.zeros((side, side, 3), np.uint8))
        assert len(trims) == made


def test_images_at_once_have_room_for_each(monkeypatch):
    plan = process_bytes([NetConfig()], 720, 1280)
    monkeypatch.setattr(memory, "resident_bytes", lambda: plan)
    trims = []
    monkeypatch.setattr(memory, "_trim", trims.append)
    make_room(plan, plan, 2)
    assert not trims
    make_room(plan, plan, 1)
    assert trims


def test_images_that_are_under_way_are_counted(monkeypatch):
    asked = []
    monkeypatch.setattr(restore, "make_room", lambda planned, most, at_once: asked.append((planned, most, at_once)))
    restorer = Restorer([network_of(NetConfig(width=8))], Recipe((Step("w"),), tile="whole"))
    both = Barrier(2, timeout=60)
    network = restorer._networks["float32"][0]
    restorer._networks["float32"][0] = lambda image: both.wait() * 0 + network(image)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(restorer, [np.zeros((side, side, 3), np.uint8) for side in (64, 96)]))
    assert sorted(at_once for *_, at_once in asked) == [1, 2]
    plans = [restorer.process_bytes(side, side, None) for side in (64, 96)]
    assert sorted(planned for planned, _, _ in asked) == plans
    assert max(most for _, most, _ in asked) == plans[1]
