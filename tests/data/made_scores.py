"""What the bundled weights score on made data sets: writes made_scores.json beside this file.

Run it with `python -m tests.data.made_scores` after a change that is meant to change these numbers.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from pipelines import datasets, flows, made, manifest, stages
from pipelines.actor import RestoreActor
from pipelines.datasets import DataName
from pipelines.settings import RestoreJob

GOLDEN = Path(__file__).with_suffix(".json")
SETS: dict[DataName, dict[str, Any]] = {
    "gopro": {"images": 4, "size": (96, 160)},
    "sidd": {"images": 1},
    "reds": {"images": 4, "size": (96, 160)},
}
SCORES = ("psnr_input", "psnr", "ssim_3d_input", "ssim_3d", "ssim_2d_input", "ssim_2d")


def scores(data: DataName, folder: Path) -> dict[str, dict[str, float]]:
    """Scores of every image, by key: the stages of a run, one after the other."""
    made.make(data, folder / "set", **SETS[data])
    found = datasets.find(data, str(folder / "set"))
    job = RestoreJob(
        source=found.source,
        reference=found.reference,
        include=found.include,
        pair=found.pair,
        output=str(folder / "out"),
        protocol=data,
        tile="whole",
    )
    prepared = flows.prepare(job)
    plan = manifest.plan(job, prepared.recipe.hash, prepared.protocol)
    work = prepared.work(plan.source, plan.reference)
    actor = RestoreActor(work)
    tables = [stages.finish(actor(table), work) for pairs in plan.tables() for table in stages.fetch(pairs, work)]
    rows = [row for table in tables for row in table.to_pylist()]
    return {row["key"]: {name: row[name] for name in SCORES} for row in rows}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        result = {data: scores(data, Path(folder) / data) for data in SETS}
    GOLDEN.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")
