"""`nafnet benchmark`: a published number, met or not."""

from inspect import signature
from typing import Annotated, Any, Literal

import typer

from nafnet.conventions import ProfileName, ProtocolName
from nafnet.recipe import Precision
from pipelines.cli_common import RayAddress, Storage, clear_errors, end_early, end_together, fail, quiet, words_of


def benchmark(
    data: Annotated[
        Literal["gopro", "sidd", "reds"] | None, typer.Argument(help="The test set; left out with --all.")
    ] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            metavar="URL",
            help="The data set as it is distributed: a folder or a prefix. With --all NAME=URL, once for each. Or a "
            "list (.csv, .jsonl, .parquet) with the columns source and reference, or any folder with --reference.",
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(help="Prefix to write to. Default: benchmark/, then data set and checkpoint."),
    ] = None,
    checkpoint: Annotated[
        list[str] | None,
        typer.Option(
            help="A catalog name, a file or a URL; may repeat. {row} in it stands for the name of each ablation row of "
            "--against. Default: the widest NAFNet of the data set."
        ),
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(
            help="The catalog or ablation row whose published value is to be met, one for each checkpoint. With {row} "
            "in --checkpoint: rows, tables (table5) or globs. Default: the checkpoint's own."
        ),
    ] = None,
    expect: Annotated[
        str | None, typer.Option(metavar="PSNR[,SSIM]", help="The value to meet instead, SSIM being the 3-D one.")
    ] = None,
    images: Annotated[int | None, typer.Option(help="How many images there should be. Default: as published.")] = None,
    all_: Annotated[bool, typer.Option("--all", help="Every published checkpoint of the data sets given.")] = False,
    variant: Annotated[
        Literal["gamma"] | None, typer.Option(help="gamma: GoPro's blur_gamma, which is not the published one.")
    ] = None,
    reference: Annotated[
        str | None, typer.Option(help="Where the sharp originals lie, for a data set that lies in a way of its own.")
    ] = None,
    pair: Annotated[
        str | None, typer.Option(metavar="OLD=NEW", help="How references are named then, as in nafnet restore.")
    ] = None,
    include: Annotated[
        list[str] | None, typer.Option(metavar="GLOB", help="Which images of it are scored then; may repeat.")
    ] = None,
    explain: Annotated[
        bool, typer.Option("--explain/--no-explain", help="When it is off, look for the cause on a sample.")
    ] = True,
    tlc: Annotated[bool | None, typer.Option("--tlc/--no-tlc", help="Default: as the catalog says.")] = None,
    train_size: Annotated[int | None, typer.Option(help="Side of the training crops in px (TLC window).")] = None,
    protocol: Annotated[ProtocolName | None, typer.Option(help="Another data set's protocol.")] = None,
    metrics: Annotated[ProfileName, typer.Option(help="Whose way of computing scores is followed.")] = "authors",
    precision: Annotated[Precision, typer.Option(help="Number format; others are rows of their own.")] = "float32",
    tile: Annotated[str, typer.Option(metavar="auto|whole|PX", help="Tiles, too, are a row of their own.")] = "whole",
    actors: Annotated[int | None, typer.Option(help="Processes that hold the network.")] = None,
    gpus_per_actor: Annotated[float, typer.Option(help="GPUs each actor reserves; 0 restores on the CPU.")] = 0,
    ray_address: RayAddress = "local",
    storage: Storage = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show what Ray and Prefect say too.")] = False,
) -> None:
    """Restore a published test set, score it as its authors do, and compare with the published number.

    Ends with 0 when every number was reproduced, with 1 when one was not (the likely cause is named), and with 2
    when nothing was started. A broken run goes on where it was.
    """
    quiet(verbose)
    end_together()
    from pydantic import ValidationError

    from pipelines import flows
    from pipelines.benchmark import Verdict, lines, read_verdict, table_markdown, write_table
    from pipelines.storage import Store

    settings = {
        "variant": variant, "explain": explain, "tlc": tlc, "train_size": train_size, "protocol": protocol,
        "metrics": metrics, "precision": precision, "tile": int(tile) if tile.isdecimal() else tile, "actors": actors,
        "gpus_per_actor": gpus_per_actor, "ray_address": ray_address, "images": images, "storage": storage,
        "reference": reference, "pair": pair, "include": tuple(include) if include else None,
    }  # fmt: skip
    verdicts: list[Verdict] = []
    with clear_errors():
        psnr, ssim = _expected(expect)
        base = output or "benchmark"
        if all_ and (odd := _odd({"DATA": data, "--checkpoint": checkpoint, "--against": against, "--expect": expect})):
            raise ValueError(f"--all runs every published checkpoint against its own value: leave out {odd}")
        # Another precision and tiles are runs of their own, which leave the published kind's where it is.
        kind = "".join(f"-{word}" for word, usual in ((precision, "float32"), (tile, "whole")) if word != usual)
        runs = _all(where or []) if all_ else _some(data, where, checkpoint, against)
        places = [base] if output is not None and len(runs) == 1 else [f"{base}/{_folder(one)}{kind}" for one in runs]
        if twice := sorted({place for place in places if places.count(place) > 1}):
            raise ValueError(f"several runs would write to {', '.join(twice)}: run them one by one, with --output")
        jobs: list[dict[str, Any]] = [
            settings | {
                "data": name, "url": url, "output": place, "checkpoint": one, "against": goal,
                "expect_psnr": psnr, "expect_ssim_3d": ssim,
            }
            for (name, url, one, goal), place in zip(runs, places, strict=True)
        ]  # fmt: skip
        usual = {name: one.default for name, one in signature(flows.benchmark.fn).parameters.items()}
        for parameters in jobs:
            try:
                flows.prepare(flows.benchmark_job({**usual, **parameters})[2])
            except ValidationError as error:
                raise ValueError(words_of(error)) from error
        for parameters, place in zip(jobs, places, strict=True):
            state = flows.benchmark(**parameters, return_state=True)
            if not state.is_completed() and state.name != flows.NOT_REPRODUCED:
                end_early(state)
            verdict = read_verdict(Store(place))
            verdicts.append(verdict)
            print("\n".join(lines(verdict)))
            print(f"report     {Store(place).url('report.html')}\n")
        if all_ or len(verdicts) > 1:
            print(table_markdown(verdicts))
            for what, where_to in write_table(Store(base), verdicts).items():
                print(f"{what:<10} {where_to}")
    failed = [f"{verdict.data} {verdict.checkpoint}" for verdict in verdicts if not verdict.reproduced]
    if failed:
        fail(f"not reproduced: {', '.join(failed)}", code=1)


Run = tuple[str, str, str, str | None]  # data set, URL, checkpoint, whose value is to be met


def _folder(run: Run) -> str:
    """What a run's output is called: by its row where that is an ablation, else by its checkpoint."""
    from nafnet.ablations import ABLATIONS

    data, _, checkpoint, goal = run
    return f"{data}-{goal.replace('/', '-') if goal in ABLATIONS else checkpoint.rpartition('/')[2]}"


def _odd(given: dict[str, object]) -> str:
    """The names of what was given."""
    return ", ".join(name for name, value in given.items() if value)


def _some(
    data: str | None, where: list[str] | None, checkpoints: list[str] | None, against: list[str] | None
) -> list[Run]:
    """A run for each checkpoint on one data set."""
    from nafnet.ablations import select
    from pipelines.benchmark import default_checkpoint

    if data is None:
        raise ValueError("which test set? nafnet benchmark gopro --data URL, or --all --data gopro=URL ...")
    if len(where or []) != 1:
        raise ValueError(f"--data takes one URL with {data}, got {len(where or [])}")
    chosen = checkpoints or [default_checkpoint(data)]
    goals: list[str | None] = [*against] if against else [None for _ in chosen]
    if templates := [one for one in chosen if "{row}" in one]:
        if len(chosen) > 1 or not against:
            raise ValueError(
                f"{templates[0]}: {{row}} takes one --checkpoint, and the rows that it stands for as --against"
            )
        goals = [row.name for row in select(*against)]
        chosen = [templates[0].replace("{row}", str(name)) for name in goals]
    if len(goals) != len(chosen):
        raise ValueError(f"{len(chosen)} checkpoints need as many --against, got {len(goals)}")
    url = (where or [""])[0].removeprefix(f"{data}=")
    return [(data, url, name, goal) for name, goal in zip(chosen, goals, strict=True)]


def _all(where: list[str]) -> list[Run]:
    """A run for every published checkpoint of the data sets that are given as NAME=URL."""
    from nafnet.catalog import CATALOG
    from pipelines.datasets import DATA_SETS

    places = dict(one.split("=", 1) for one in where if "=" in one)
    if not places or len(places) != len(where) or not places.keys() <= set(DATA_SETS):
        raise ValueError(f"--all takes --data NAME=URL for one or more of {', '.join(DATA_SETS)}, got {where}")
    return [
        (row.protocol, places[row.protocol], row.name, None)
        for row in CATALOG.values()
        if row.psnr is not None and row.protocol in places
    ]


def _expected(value: str | None) -> tuple[float | None, float | None]:
    """PSNR and SSIM-3D of PSNR[,SSIM]."""
    if value is None:
        return None, None
    try:
        psnr, _, ssim = value.partition(",")
        return float(psnr), float(ssim) if ssim else None
    except ValueError as error:
        raise ValueError(f"--expect takes PSNR or PSNR,SSIM in numbers, got {value!r}") from error
