"""The process that holds the network: what happens to rows between `stages.fetch` and `stages.finish`."""

import os
import socket
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Condition, Lock
from typing import Any

import pyarrow as pa
import torch

from nafnet import checkpoint
from nafnet.conventions import Convention
from nafnet.memory import available_bytes
from nafnet.recipe import Recipe
from nafnet.restore import Pixels, Restored, Restorer, to_float
from pipelines.records import Status
from pipelines.stages import Row, Work, crashed, ended, pixels_of, rows_of, table_of, written_dtype
from pipelines.storage import use
from pipelines.weights import adopt_prefix, locate

_ON_GPU = 2  # one image is copied while another is restored


def load_restorer(
    weights: Sequence[str], recipe: Recipe, *, device: str = "cpu", memory: int | None = None
) -> Restorer:
    """The restorer that a settled recipe describes, from `weights` as a person names them (file, URL, catalog name).

    Raises:
        CheckpointError, ValueError: the weights cannot be found or read here, or are not those of the recipe.
    """
    loaded = [checkpoint.load(locate(name)) for name in weights]
    for name, found, step in zip(weights, loaded, recipe.steps, strict=True):
        if found.sha256 != step.weights:
            raise ValueError(f"{name} is another file here than where the job was planned: {step.weights}")
    return Restorer([found.network for found in loaded], recipe, device=device, memory=memory)


class _Threads:
    """The threads of an actor, shared out among the calls of the network that are under way."""

    def __init__(self, count: int) -> None:
        self.all = self._free = count
        self._expected = 0
        self._changed = Condition()
        self._turn = Lock()  # of who waits: else one that needs all of them would never get them

    @contextmanager
    def expect(self, calls: int) -> Iterator[None]:
        """So many calls will want threads in this context."""
        with self._changed:
            self._expected += calls
        try:
            yield
        finally:
            with self._changed:
                self._expected -= calls

    @contextmanager
    def take(self, at_once: int) -> Iterator[int]:
        """Wait for the threads of a call that may be under way with up to `at_once` such calls; gives their number."""
        with self._turn, self._changed:
            # None are expected any more where another call of the same table has failed.
            count = max(1, self.all // max(1, min(at_once, self._expected)))
            self._changed.wait_for(lambda: self._free >= count)
            self._free -= count
        try:
            yield count
        finally:
            with self._changed:
                self._free += count
                self._changed.notify_all()


class RestoreActor:
    """Holds the network, built once, and restores the pixels of each row that is on its way."""

    def __init__(self, work: Work) -> None:
        """Load and check the weights. Raises CheckpointError or ValueError when they are not the recipe's."""
        use(work.storage)
        adopt_prefix(work.weights_from)
        torch.set_num_threads(work.threads)
        if work.recipe.deterministic:  # cuBLAS reads it when it starts
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        self.work = work
        self.worker = f"{socket.gethostname()}:{os.getpid()}"
        memory = available_bytes(work.device, work.memory_share) // (1 if work.device == "cpu" else _ON_GPU)
        self.restorer = load_restorer(work.weights, work.recipe, device=work.device, memory=memory)
        self._threads = _Threads(work.threads if work.device == "cpu" else _ON_GPU)
        # One for all tables: on a GPU each of its threads has a stream.
        self._pool = ThreadPoolExecutor(self._threads.all)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """`PIXEL_SCHEMA` in and out. Images of one size and kind pass through the network together where that pays.

        Called for two tables at once, no thread is idle while the last images of one are under way.
        """
        rows = list(rows_of(batch))
        groups = defaultdict[tuple[Any, ...], list[int]](list)  # their places in `rows`
        for i, row in enumerate(rows):
            if not row["status"]:
                groups[row["height"], row["width"], row["channels"], row["dtype"], row["reference"] is None].append(i)
        calls = list[tuple[list[int], int]]()
        for (height, width, *_), places in groups.items():
            most, at_once = self.restorer.batch(height, width), self._at_once(height, width)
            if self.work.device == "cpu":
                most = min(most, -(-len(places) // at_once))  # else some threads would have none
            calls += [(places[i : i + most], at_once) for i in range(0, len(places), most)]
        # A lone call has all threads of a CPU; on a GPU it leaves room for another.
        expected = len(calls) if self.work.device == "cpu" else max(len(calls), _ON_GPU)
        with self._threads.expect(expected):
            done = self._pool.map(lambda call: self._restore([rows[i] for i in call[0]], call[1]), calls)
            for (places, _), restored in zip(calls, done, strict=True):
                for i, row in zip(places, restored, strict=True):
                    rows[i] = row
        return table_of(rows)

    def _at_once(self, height: int, width: int) -> int:
        """How many calls of the network on images of this size (px) may be under way at once.

        On a CPU each call has a thread of its own where memory allows: threads that share one wait for the slowest
        of them at every strip, which is the one whose core scoring and encoding use meanwhile.
        """
        if self.work.device != "cpu":
            return _ON_GPU
        fits = self.work.threads * self.restorer.process_bytes(height, width, None) <= self.restorer.memory
        return self.work.threads if fits else 1

    def _restore(self, rows: list[Row], at_once: int) -> list[Row]:
        """Rows of one size and kind, which share their time in the network, with up to that many such calls."""
        with self._threads.take(at_once) as threads:
            if self.work.device == "cpu":
                # Each thread of Python has a setting of its own, which its first question makes.
                torch.get_num_threads()
                torch.set_num_threads(threads)
            return self._restore_with(rows, threads / self._threads.all)

    def _restore_with(self, rows: list[Row], share: float) -> list[Row]:
        """The same, with this share of the actor's threads."""
        started = time.perf_counter()
        try:
            restored = self.restorer.restore_batch([self._input(row) for row in rows])
        except (ValueError, MemoryError) as error:  # such as colour for a network of grey images, or far too large
            if len(rows) > 1:
                return [end for row in rows for end in self._restore_with([row], share)]
            return [ended(rows[0], Status.REFUSED, str(error))]
        except self.work.caught as error:
            return [crashed(row, "restoring it", error) for row in rows]
        seconds = (time.perf_counter() - started) * share / len(rows)
        return [self._output(row, one, seconds) for row, one in zip(rows, restored, strict=True)]

    def _input(self, row: Row) -> Pixels:
        pixels = pixels_of(row, "pixels", row["dtype"])
        scored_unrounded = row["reference"] is not None and not Convention.parse(self.work.protocol).rounds
        if scored_unrounded or written_dtype(row, self.work) != row["dtype"]:
            return to_float(pixels)  # rounded once, by whoever needs integers
        return pixels

    def _output(self, row: Row, restored: Restored, seconds: float) -> Row:
        return {
            **row,
            "pixels": row["pixels"] if row["reference"] is not None else None,  # needed again only to score
            "restored": restored.pixels,
            "restored_dtype": restored.pixels.dtype.name,
            "seconds": seconds,
            "tiles": restored.tiles,
            "tile": restored.tile,
            "precision": restored.precision,
            "suspect": restored.suspect,
            "note": restored.note,
            "worker": self.worker,
        }
