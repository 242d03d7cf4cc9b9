"""`nafnet datasets`: look at data sets, make small ones, pack results."""

import re
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from pipelines.cli_common import Storage, clear_errors, fail, use_storage

app = typer.Typer(help="Look at data sets, make small ones, pack results.", no_args_is_help=True)

Data = Literal["gopro", "sidd", "reds"]


@app.command()
def check(
    data: Annotated[Data, typer.Argument(help="Which data set it should be.")],
    url: Annotated[str, typer.Argument(help="Folder or prefix that holds it.")],
    variant: Annotated[
        Literal["gamma", "benchmark"] | None,
        typer.Option(help="gamma: GoPro's blur_gamma; benchmark: SIDD's blocks without references."),
    ] = None,
    storage: Storage = None,
) -> None:
    """Say what is there and what keeps the published number from being met: counts, partners, sizes, duplicates.

    Ends with 1 when something does, with 2 when nothing there looks like the data set.
    """
    from pipelines.check import check as look
    from pipelines.check import lines

    with clear_errors():
        use_storage(storage)
        findings = look(data, url, variant=variant)
        print("\n".join(lines(findings)))
    if findings.problems:
        raise typer.Exit(1)


@app.command()
def make(
    folder: Annotated[Path, typer.Argument(help="Where to write it; made if need be, and empty.")],
    like: Annotated[Data, typer.Option(help="Whose format it has.")],
    images: Annotated[int, typer.Option(help="Scored images; for sidd scenes, of 32 blocks each.")],
    layout: Annotated[
        str | None,
        typer.Option(
            metavar="LAYOUT",
            help="gopro: tree, flat, lmdb, tar. sidd: mat, benchmark, lmdb. reds: tree, lmdb. Default: the first.",
        ),
    ] = None,
    size: Annotated[str, typer.Option(metavar="WIDTHxHEIGHT", help="In px; blocks of sidd are 256x256.")] = "1280x720",
    seed: Annotated[int, typer.Option(help="Another one gives other pictures.")] = 0,
) -> None:
    """Make a small data set of procedural pictures, in a format in which a real one is distributed.

    The same arguments write the same bytes. What a network scores on it compares with nothing published.
    """
    from pipelines.made import make as write

    def report(done: int, total: int) -> None:
        print(f"{done} of {total}", end="\r" if done < total and sys.stderr.isatty() else "\n", file=sys.stderr)

    with clear_errors():
        sides = re.fullmatch(r"(\d+)x(\d+)", size)
        if not sides:
            raise ValueError(f"--size takes WIDTHxHEIGHT in px, such as 1280x720; got {size!r}")
        write(
            like,
            folder,
            images=images,
            layout=layout,
            size=(int(sides[2]), int(sides[1])),
            seed=seed,
            report=report,
        )
        print(f"made {folder}")
        print(
            f"look at it with: nafnet datasets check {like} {folder}" + " --variant benchmark" * (layout == "benchmark")
        )


@app.command()
def pack(
    source: Annotated[str, typer.Argument(help="What to pack: a folder, an .lmdb, a .mat, or tar shards.")],
    output: Annotated[str, typer.Argument(help="Prefix to write shards to.")],
    name: Annotated[str, typer.Option(help="How the shards' names begin.")] = "shard",
    shard_images: Annotated[int, typer.Option(help="Images in a shard.")] = 1000,
    storage: Storage = None,
) -> None:
    """Pack images into tar shards as WebDataset reads them, such as the restored images of a run (its images/)."""
    from pipelines.pack import pack as write

    with clear_errors():
        if shard_images < 1:
            raise ValueError(f"--shard-images must be 1 or more, got {shard_images}")
        use_storage(storage)
        for url, count in write(source, output, name=name, shard_images=shard_images):
            print(f"{count:6d} images  {url}")


@app.command()
def submit(
    run: Annotated[str, typer.Argument(help="Output prefix of a run over SIDD's benchmark blocks.")],
    form: Annotated[
        Literal["csv", "mat"], typer.Option(help="csv: ID,BLOCK for the present server; mat: for the older one.")
    ] = "csv",
    storage: Storage = None,
) -> None:
    """Write the file that SIDD's benchmark takes, from the restored blocks of a run, and read it back to verify it."""
    from pipelines.submission import write_submission

    with clear_errors():
        use_storage(storage)
        place, blocks = write_submission(run, form)
        print(f"wrote {place}: {blocks} blocks, read back and equal to the run's")
    if blocks != 1280:
        fail(f"the benchmark wants 1280 blocks, this has {blocks}", code=1)
