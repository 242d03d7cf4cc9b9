"""Planning at scale: listing, pairing, choosing and writing the manifest; then resuming on a report of all keys.

Keys and references are those of a file system that is made up as it is asked, so that this project's own work alone is
timed. Each figure is of a process of its own with all that it imports: `python -m tests.benchmarks.plan STEP COUNT
FOLDER` prints one.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import fsspec
import pyarrow as pa
from fsspec.spec import AbstractFileSystem

from pipelines import report, report_html, report_sheet
from pipelines.arrow import arrow_file
from pipelines.manifest import Plan, plan
from pipelines.parts import PartWriter
from pipelines.records import REPORT_SCHEMA
from pipelines.settings import RestoreJob
from pipelines.storage import Store
from tests.peak import peak_bytes

SIZES = (10_000, 100_000, 1_000_000)
BARS = "1,000,000 keys: plan within 90 s and resume within 30 s, each within 1000 MB"
_FOLDER = 1000  # files in each
_PART = 512  # rows of a report part, as a run writes them
_HASH = "0123456789abcdef" * 4


class MadeUp(AbstractFileSystem):  # type: ignore[misc]
    """`made://COUNT/in` and `made://COUNT/ref`: COUNT files each, by thousands in folders."""

    protocol = "made"
    cachable = False

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        path = self._strip_protocol(path)
        count, *folders = path.split("/")
        if len(folders) == 1:
            names = [f"{path}/{i:06d}" for i in range(-(-int(count) // _FOLDER))]
            found = [{"name": name, "size": 0, "type": "directory"} for name in names]
        elif len(folders) == 2:
            first = int(folders[1]) * _FOLDER
            found = [self._file(path, i) for i in range(first, min(first + _FOLDER, int(count)))]
        else:
            raise FileNotFoundError(path)
        return found if detail else [info["name"] for info in found]

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        return {"name": self._strip_protocol(path), "size": 0, "type": "directory"}

    @staticmethod
    def _file(folder: str, i: int) -> dict[str, Any]:
        return {"name": f"{folder}/image-{i:07d}.png", "size": 100_000 + i, "type": "file", "ETag": f'"{i:032x}"'}


def lines(sizes: tuple[int, ...] = SIZES) -> list[str]:
    """What planning, resuming and reporting take, a line each."""
    text = [BARS]
    for count in sizes:
        with tempfile.TemporaryDirectory() as folder:
            for step in STEPS:
                command = [sys.executable, "-m", "tests.benchmarks.plan", step, str(count), folder]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                found = json.loads(done.stdout)
                if found:
                    text.append(
                        f"{count:>9,} keys, {step:<7} {found['seconds']:>7.2f} s {found['mb']:>6.0f} MB at most"
                    )
    return text


def _plan(job: RestoreJob) -> Plan:
    return plan(job, _HASH, "gopro")


def _rows(job: RestoreJob) -> None:
    """A report of everything that the last plan of this output holds, in parts as small as a run's."""
    writer = PartWriter(Store(job.output))
    manifest = Store(f"{job.output}/manifest")
    scores = dict.fromkeys(("psnr_input", "ssim_2d_input", "ssim_3d_input"), 0.5)
    scores |= dict.fromkeys(("psnr", "ssim_2d", "ssim_3d", "seconds", "fetch_seconds", "finish_seconds"), 0.75)
    fixed = {"status": "restored", "recipe": _HASH, "protocol": "gopro", "precision": "float32", "digest": _HASH}
    fixed |= {
        "width": 1280,
        "height": 720,
        "channels": 3,
        "bit_depth": 8,
        "worker": "node-0123456789ab/12345",
        **scores,
    }
    fixed["finished_at"] = datetime.now(UTC)
    for entry in manifest.list():
        pairs = pa.parquet.read_table(arrow_file(manifest.read(entry.key)))
        for start in range(0, len(pairs), _PART):
            some = pairs.slice(start, _PART)
            columns = [
                some[field.name]
                if field.name in some.column_names
                else pa.repeat(pa.scalar(fixed.get(field.name), field.type), len(some))
                for field in REPORT_SCHEMA
            ]
            writer.write(pa.table(columns, REPORT_SCHEMA.names))


def _resume(job: RestoreJob) -> None:
    again = _plan(job)
    assert (again.to_restore, again.finished) == (0, again.matched)


def _report(job: RestoreJob) -> None:
    """What a run does after its last image."""
    output = Store(job.output)
    rows = report.read_rows(output, report.SHOWN, recipe=_HASH)
    summary = report.summarize(rows)
    whole = report.read_rows(output, recipe=_HASH, keys=report_sheet.telling(rows))
    report_html.write_report(output, rows, summary, {}, strips=report_sheet.load_strips(whole))


STEPS: dict[str, Callable[[RestoreJob], object]] = {"plan": _plan, "rows": _rows, "resume": _resume, "report": _report}


def main(step: str, count: str, folder: str) -> None:
    fsspec.register_implementation("made", MadeUp, clobber=True)
    job = RestoreJob(source=f"made://{count}/in", reference=f"made://{count}/ref", output=f"{folder}/out")
    started = time.perf_counter()
    STEPS[step](job)
    seconds = time.perf_counter() - started
    print(json.dumps(None if step == "rows" else {"seconds": seconds, "mb": peak_bytes() / 1e6}))


if __name__ == "__main__":
    main(*sys.argv[1:])
