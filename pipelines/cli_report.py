"""`nafnet report`: look after the report of an output."""

from typing import Annotated

import typer

from pipelines.cli_common import Storage, clear_errors, use_storage

app = typer.Typer(help="Look after the report of an output.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """A group even with one command."""


@app.command()
def compact(
    output: Annotated[str, typer.Argument(help="Output of nafnet restore, a path or an fsspec URL.")],
    storage: Storage = None,
) -> None:
    """Fold the parts of report/ into few large ones with one row per image, the latest.

    Ends with 2 when a run is under way there, or there is no report.
    """
    from pipelines import lease, parts
    from pipelines.storage import Store

    with clear_errors():
        use_storage(storage)
        store = Store(output)
        if not store.exists("report"):
            raise ValueError(f"no report at {store.url('report')}: give the output of a run")
        with lease.hold(store, "nafnet report compact"):
            folded = parts.compact(store)
    print(f"parts      {folded.before} before, {folded.after} now")
    print(f"rows       {folded.rows} kept, {folded.dropped} older ones dropped")
