"""`nafnet report` as a person types it."""

from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
from typer.testing import CliRunner

from pipelines import lease
from pipelines.cli import app
from pipelines.parts import PartWriter
from pipelines.records import REPORT_SCHEMA
from pipelines.report import part_names
from pipelines.storage import Store


def test_compact_folds_parts_but_not_under_a_run(tmp_path: Path) -> None:
    output = Store(str(tmp_path))
    fixed = {"status": "restored", "recipe": "r", "source": "s", "size": 1, "fingerprint": "f"}
    for key in ("a", "b", "a"):
        row = {**fixed, "key": key, "finished_at": datetime.now(UTC)}
        PartWriter(output).write(pa.Table.from_pylist([row], schema=REPORT_SCHEMA))
    with lease.hold(output, "flow run quick-fox"):
        refused = CliRunner().invoke(app, ["report", "compact", str(tmp_path)])
    assert refused.exit_code == 2
    assert f"nafnet: {tmp_path} is in use by flow run quick-fox, process " in refused.stderr
    assert len(part_names(output)) == 3

    done = CliRunner().invoke(app, ["report", "compact", str(tmp_path)])
    assert done.exit_code == 0
    assert done.stdout == "parts      3 before, 1 now\nrows       2 kept, 1 older ones dropped\n"
    assert len(part_names(output)) == 1
    assert not output.exists(lease.KEY)


def test_compact_of_what_is_no_output_says_so(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["report", "compact", str(tmp_path)])
    assert done.exit_code == 2
    assert done.stderr == f"nafnet: no report at {tmp_path}/report: give the output of a run\n"
    assert list(tmp_path.iterdir()) == []
