"""Compiled loops on the threads that torch computes with."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from numba import carray

from nafnet import team
from nafnet.team import SIZES, Loop, take, threads

needs_a_runtime = pytest.mark.skipif(team._parallel is None, reason="torch has no OpenMP runtime here")


def count(call):
    """Adds one to a counter for each part."""
    parts = carray(call[1], (SIZES,), np.int64)[0]
    counters = carray(call[2], (parts,), np.int64)
    while True:
        part = take(call[0])
        if part >= parts:
            break
        counters[part] += 1


def meet(call):
    """Each part says that it has begun, then waits, for seconds at most, until all have, and says how many it saw."""
    parts = carray(call[1], (SIZES,), np.int64)[0]
    begun, seen = carray(call[2], (parts,), np.float64), carray(call[3], (parts,), np.float64)
    while True:
        part = take(call[0])
        if part >= parts:
            break
        begun[part] = 1
        for _ in range(100_000_000):
            seen[part] = begun.sum()
            if seen[part] == parts:
                break


@pytest.fixture
def _two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_two_threads")
@pytest.mark.parametrize("parts", [1, 2, 7])
@pytest.mark.parametrize("runtime", [pytest.param(True, marks=needs_a_runtime), False], ids=["shared", "alone"])
def test_every_part_is_done_once(parts, runtime, monkeypatch):
    if not runtime:
        monkeypatch.setattr(team, "_parallel", None)
    counters = np.zeros(parts, np.int64)
    loop = Loop(count)
    for _ in range(100):
        loop((parts,), counters)
    assert counters.tolist() == [100] * parts


@needs_a_runtime
@pytest.mark.usefixtures("_two_threads")
def test_parts_run_at_the_same_time():
    begun, seen = np.zeros(2), np.zeros(2)
    Loop(meet)((2,), begun, seen)
    assert seen.tolist() == [2, 2]


@pytest.mark.usefixtures("_two_threads")
def test_callers_do_not_disturb_one_another():
    loop = Loop(count)

    def call(_):
        counters = np.zeros(3, np.int64)
        for _ in range(200):
            loop((3,), counters)
        return counters.tolist()

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(call, range(4))) == [[200] * 3] * 4


@needs_a_runtime
@pytest.mark.usefixtures("_two_threads")
def test_as_many_parts_as_threads_or_as_there_is_work_for(monkeypatch):
    assert [threads(most) for most in (1, 2, 9)] == [1, 2, 2]
    monkeypatch.setattr(team, "_parallel", None)
    assert threads(9) == 1


def test_numbers_with_gaps_between_them_are_refused():
    with pytest.raises(ValueError, match="side by side"):
        Loop(count)((2,), np.zeros(4, np.int64)[::2])


def test_where_nothing_can_be_written_each_process_compiles_for_itself():
    """A function that came from no file has no place for a cache, like a package that nobody may write beside."""
    space = dict(vars(team), carray=carray, np=np)
    exec("def fill(call):\n    carray(call[2], (3,), np.float64)[:] = 7", space)  # noqa: S102
    values = np.zeros(3)
    Loop(space["fill"])((1,), values)
    assert values.tolist() == [7, 7, 7]
