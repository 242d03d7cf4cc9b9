"""The `nafnet` command. Ray and Prefect are loaded by the commands that need them, so the others start at once."""

import json
import logging
import math
import os
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer

from nafnet import catalog, checkpoint
from nafnet.conventions import Convention, ProfileName, ProtocolName, label
from nafnet.memory import process_bytes
from nafnet.model import Activation, Attention, NetConfig, Network, Norm, Sigma, multiply_adds, parameters
from nafnet.recipe import Precision
from nafnet.tlc import windows

app = typer.Typer(
    help="Restore, score and account for image collections with NAFNet.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,  # locals may hold what must not be printed
    context_settings={"help_option_names": ["-h", "--help"]},
)

Metrics = Annotated[ProfileName, typer.Option(help="Whose way of computing scores is followed.")]
CropBorder = Annotated[int, typer.Option(help="Margin that basicsr and mmagic leave out of scores, px.")]
YChannel = Annotated[bool, typer.Option("--y-channel", help="Score the luma alone, under basicsr and mmagic.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show what Ray and Prefect say too.")]


@app.command()
def restore(
    source: Annotated[str, typer.Argument(help="Folder or prefix of degraded images: a path or an fsspec URL.")],
    output: Annotated[str, typer.Argument(help="Prefix to write images/, report/ and report.html to.")],
    reference: Annotated[
        str | None, typer.Option(help="Sharp originals under the same relative names, to score against.")
    ] = None,
    checkpoint: Annotated[
        list[str] | None,
        typer.Option(
            help="A file, a URL, or a name from the catalog (nafnet info lists them); may repeat: one network then "
            "restores what the one before it made. Default: the bundled demo."
        ),
    ] = None,
    tlc: Annotated[
        bool | None,
        typer.Option(
            "--tlc/--no-tlc",
            help="Local attention windows. Default: what the catalog says; on for other files.",
        ),
    ] = None,
    train_size: Annotated[
        int | None,
        typer.Option(help="Side of the training crops in px (TLC window). Default: what the file says, else 256."),
    ] = None,
    protocol: Annotated[
        ProtocolName | None,
        typer.Option(help="The data set that scores are for. Default: the checkpoint's own, else as stored."),
    ] = None,
    metrics: Metrics = "authors",
    crop_border: CropBorder = 0,
    y_channel: YChannel = False,
    precision: Annotated[Precision, typer.Option(help="Number format of the network.")] = "float32",
    tile: Annotated[
        str,
        typer.Option(
            metavar="auto|whole|PX",
            help="Side of tiles in px; auto: whole images where they fit into memory, else the largest tile that does.",
        ),
    ] = "auto",
    halo: Annotated[int, typer.Option(help="Margin around a tile that is restored and thrown away, px.")] = 192,
    strength: Annotated[
        float, typer.Option(help="Share of the restored image in the result, the rest is the input; up to 1.")
    ] = 1,
    self_ensemble: Annotated[
        bool,
        typer.Option("--self-ensemble", help="The mean over eight flips and rotations, in eight times as long."),
    ] = False,
    guard: Annotated[
        Literal["on", "off"], typer.Option(help="Write the input for an implausible result, and mark it suspect.")
    ] = "on",
    deterministic: Annotated[
        bool,
        typer.Option("--deterministic", help="The same bits on every run and with any number of actors; slower."),
    ] = False,
    format: Annotated[  # noqa: A002 - the option's name
        Literal["same", "png", "jpeg", "tiff", "webp", "bmp"], typer.Option(help="File format to write.")
    ] = "same",
    quality: Annotated[
        int | None, typer.Option(help="1 to 100, with --format jpeg (default 95) or webp (default lossless).")
    ] = None,
    subsampling: Annotated[
        Literal["4:4:4", "4:2:2", "4:2:0"] | None, typer.Option(help="Of a jpeg's colours. Default: 4:4:4.")
    ] = None,
    actors: Annotated[
        int | None,
        typer.Option(help="Processes that hold the network. Default: one for four CPUs, or all GPUs."),
    ] = None,
    gpus_per_actor: Annotated[float, typer.Option(help="GPUs each actor reserves; 0 restores on the CPU.")] = 0,
    ray_address: Annotated[
        str, typer.Option(help="'local' starts Ray for this run; 'auto' or host:port joins a cluster.")
    ] = "local",
    include: Annotated[
        list[str] | None,
        typer.Option(help="Glob of the keys to restore; may repeat. Default: the image extensions."),
    ] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Glob of the keys to leave out; may repeat.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first so many keys, in order of their names.")] = None,
    max_failed: Annotated[int, typer.Option(help="How many images may fail before the run ends red.")] = 0,
    retry_failed: Annotated[bool, typer.Option(help="Also redo what an earlier run could not restore.")] = False,
    max_megapixels: Annotated[float, typer.Option(help="Images larger than this are refused.")] = 250,
    dry_run: Annotated[
        bool, typer.Option(help="Say what would be done and what it would cost; write nothing.")
    ] = False,
    verbose: Verbose = False,
) -> None:
    """Restore every image below SOURCE, score it if there is a reference, write images and a report to OUTPUT.

    A second run on the same output does only what is new, changed, or under another recipe. Ends with 1 when images
    could not be restored (report.html says which and why) or the run broke off, with 2 when nothing was started.
    """
    given = dict(locals())
    for name in ("dry_run", "verbose"):
        del given[name]
    given["exclude"] = tuple(exclude or ())
    for name in ("include", "checkpoint"):
        if given[name] is None:
            del given[name]
    _quiet(verbose)
    with _clear_errors():
        job = _job(given)
        if dry_run:
            _dry_run(job)
            return
        from pipelines.flows import prepare

        prepare(job)  # a wrong checkpoint or tile is said before a server is started
    _run_restore(job)


@app.command()
def score(
    restored: Annotated[str, typer.Argument(help="Folder or prefix of restored images.")],
    reference: Annotated[str, typer.Argument(help="Folder or prefix of originals under the same relative names.")],
    protocol: Annotated[ProtocolName, typer.Option(help="The data set that scores are for.")] = "stored",
    metrics: Metrics = "authors",
    crop_border: CropBorder = 0,
    y_channel: YChannel = False,
) -> None:
    """Score images that are already there: PSNR in dB and SSIM, per image and as plain means.

    Written images are rounded already, so mmagic gives the PSNR of basicsr here; restore scores before it rounds.
    """
    from pipelines.score import score_folders

    count = failed = 0
    with _clear_errors():
        convention = Convention(protocol, metrics, crop_border, y_channel)
        columns: dict[str, list[float]] = {name: [] for name in convention.scores}
        print(" ".join(f"{label(name):>8}" for name in columns) + "  image")
        for scored in score_folders(restored, reference, convention):
            if scored.scores is None:
                failed += 1
                print(" ".join(_score(None) for _ in columns) + f"  {scored.key}: {scored.reason}")
                continue
            count += 1
            for name, column in columns.items():
                value = getattr(scored.scores, name)
                if value is not None and math.isfinite(value):  # identical images are left out, as in the report
                    column.append(value)
            print(" ".join(_score(getattr(scored.scores, name)) for name in columns) + f"  {scored.key}")
    if count:
        means = " ".join(_score(statistics.fmean(column) if column else None) for column in columns.values())
        print(f"{means}  mean of {count} under protocol {convention.name}")
        print(f"scores are {convention.words}")
        if len(columns["psnr"]) < count:
            print(f"{count - len(columns['psnr'])} images equal their reference: not in the mean PSNR")
    if failed:
        _fail(f"{failed} images could not be scored", code=1)


@app.command()
def info(
    weights: Annotated[
        str | None,
        typer.Argument(metavar="CHECKPOINT", help="A file or a catalog name. Left out: list the catalog."),
    ] = None,
    height: Annotated[int, typer.Option(help="Image height for the arithmetic, px.")] = 256,
    width: Annotated[int, typer.Option(help="Image width for the arithmetic, px.")] = 256,
) -> None:
    """Say what a checkpoint holds: network, parameters, arithmetic, TLC windows. Without one, list the catalog."""
    if weights is None:
        print(f"{'name':<24} {'PSNR':>8} {'SSIM-3D':>8}  TLC  protocol")
        for row in catalog.CATALOG.values():
            scores = f"{row.psnr:8.4f} {row.ssim_3d:8.4f}" if row.psnr else f"{'-':>8} {'-':>8}"
            print(f"{row.name:<24} {scores}  {'on ' if row.tlc else 'off'}  {row.protocol}")
        return
    from pipelines.weights import locate

    with _clear_errors():
        path = locate(weights)
        loaded = checkpoint.load(path)
        if min(height, width) < 1:
            raise ValueError(f"--height and --width are numbers of px, got {height} and {width}")
    config = loaded.network.config
    entry = catalog.CATALOG.get(weights) or catalog.find_hash(loaded.sha256)
    train_size = loaded.train_size or (entry.train_size if entry else 256)
    print(f"{path}\n  sha256      {loaded.sha256}")
    print(f"  network     {config.family}, width {config.width}")
    print(f"  blocks      encoder {config.enc_blocks}, middle {config.middle_blocks}, decoder {config.dec_blocks}")
    print(f"  parameters  {parameters(loaded.network):,}")
    print(f"  arithmetic  {multiply_adds(config, height, width) / 1e9:.2f} G multiply-adds at {width}x{height}")
    print(
        f"  memory      about {process_bytes([config], height, width) / 2**20:,.0f} MiB a process at {width}x{height}"
    )
    sides = ", ".join(str(side) for side in windows(config, train_size))
    print(f"  TLC windows {sides} px by level (trained on {train_size} px crops)")
    print(f"  catalog     {entry.name if entry else 'not in the catalog'}")


@app.command()
def train(
    out: Annotated[Path, typer.Argument(help="Checkpoint to write (.safetensors); curves and history land beside it.")],
    sigma: Annotated[tuple[float, float], typer.Option(help="Least and most noise, of 255.")] = (5.0, 50.0),
    width: Annotated[int, typer.Option(help="Channels at full resolution.")] = 32,
    enc_blocks: Annotated[str, typer.Option(help="Blocks of each encoder level.")] = "1,1,1,28",
    middle_blocks: Annotated[int, typer.Option(help="Blocks in the middle.")] = 1,
    dec_blocks: Annotated[str, typer.Option(help="Blocks of each decoder level, deepest first.")] = "1,1,1,1",
    norm: Annotated[Norm, typer.Option(help="Normalisation.")] = "layer",
    activation: Annotated[Activation, typer.Option(help="Activation or gate.")] = "gate",
    attention: Annotated[Attention, typer.Option(help="Channel attention.")] = "sca",
    gate_sigma: Annotated[Sigma, typer.Option(help="What acts on one half of the gate.")] = "identity",
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 8000,
    batch: Annotated[int, typer.Option(help="Crops in a step.")] = 16,
    crop: Annotated[int, typer.Option(help="Side of a crop, px.")] = 96,
    scenes: Annotated[int, typer.Option(help="Procedural pictures to train on.")] = 800,
    seed: Annotated[int, typer.Option(help="Of the scenes, the crops, the noise and the first weights.")] = 0,
    precision: Annotated[Literal["float32", "bf16"], typer.Option(help="Number format of the network.")] = "bf16",
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
) -> None:
    """Train a denoiser on procedural scenes with the paper's recipe: no data set is needed.

    Interrupt it and run the same command again: it goes on where it was.
    """
    from nafnet.train import Progress, TrainRecipe
    from nafnet.train import train as run

    def report(progress: Progress) -> None:
        checked = f", held-out {progress.validation_psnr:.2f} dB" if progress.validation_psnr else ""
        left = progress.seconds_left / 60
        print(
            f"step {progress.step}/{progress.steps}: {progress.psnr:.2f} dB{checked}, {left:.0f} min left",
            flush=True,
        )

    with _clear_errors():
        if out.suffix != ".safetensors":
            raise ValueError(f"OUT must end in .safetensors, which is what is written: got {out}")
        network = NetConfig(
            width=width,
            enc_blocks=_counts(enc_blocks, "--enc-blocks"),
            middle_blocks=middle_blocks,
            dec_blocks=_counts(dec_blocks, "--dec-blocks"),
            norm=norm,
            activation=activation,
            attention=attention,
            sigma=gate_sigma,
        )
        recipe = TrainRecipe(
            network=network,
            sigma=sigma,
            steps=steps,
            batch=batch,
            crop_px=crop,
            scenes=scenes,
            seed=seed,
            precision=precision,
        )
        print(f"{parameters_text(network)}; drawing {scenes} scenes", flush=True)
        print(f"wrote {run(recipe, out, device=device, report=report)}")


@app.command()
def demo(
    folder: Annotated[Path, typer.Argument(help="Where to put the photographs and what becomes of them.")] = Path(
        "demo-output"
    ),
    verbose: Verbose = False,
) -> None:
    """Add noise to real photographs, restore them with the bundled weights, and score them against the originals."""
    _quiet(verbose)
    from pipelines.demo import SIGMA, make_photos

    degraded, original = make_photos(folder)
    print(f"photographs with noise of sigma {SIGMA:g}: {degraded}")
    with _clear_errors():
        job = _job({"source": str(degraded), "output": str(folder / "restored"), "reference": str(original)})
    _run_restore(job)


def main() -> None:
    """Entry point of the console script."""
    try:
        app()
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in {"nafnet", "pipelines"}:
            raise
        extra = "demo" if error.name.startswith("skimage") else "pipelines"
        print(f"nafnet: this command needs {error.name}: pip install 'nafnet-pipelines[{extra}]'", file=sys.stderr)
        sys.exit(2)


def parameters_text(config: NetConfig) -> str:
    """One line on a network that is about to be trained."""
    with torch.device("meta"):
        count = parameters(Network(config))
    return f"{config.family} of width {config.width}, {count:,} parameters"


def _run_restore(job: Any) -> None:
    from pipelines.flows import INCOMPLETE
    from pipelines.flows import restore as flow
    from pipelines.report import count_line
    from pipelines.storage import Store

    state = flow(**job.model_dump(), return_state=True)
    if not state.is_completed() and state.name != INCOMPLETE:
        _say_why(state)
    output = Store(job.output)
    summary = json.loads(output.read("summary.json"))
    print(count_line(summary))
    if summary["gain"] is not None:
        before, after, gain = summary["psnr_input"], summary["psnr"], summary["gain"]
        print(f"mean PSNR  {before:.2f} dB before, {after:.2f} dB after ({gain:+.2f} dB)")
    ssim = "ssim_2d" if summary["ssim_3d"] is None else "ssim_3d"  # the convention's own
    before, after = summary[f"{ssim}_input"], summary[ssim]
    if None not in (before, after):
        print(f"{label(ssim)}    {before:.4f} before, {after:.4f} after ({after - before:+.4f})")
    for name, words in zip(summary["protocols"], summary["conventions"], strict=True):
        print(f"scores     {name}: {words}")
    print(f"images     {output.url('images')}")
    print(f"report     {output.url('report.html')}")
    if not state.is_completed():
        _fail(f"{state.message}: the report says which and why; --retry-failed tries those again", code=1)


def _say_why(state: Any) -> None:
    """End with what stopped the run: a message for what a person can mend, a traceback for the rest."""
    error = state.result(raise_on_failure=False)
    with _clear_errors(code=1):
        if isinstance(error, BaseException):
            raise error
    _fail(f"the run ended early: {state.message}", code=1)


def _dry_run(job: Any) -> None:
    from pipelines.estimate import estimate
    from pipelines.flows import prepare
    from pipelines.manifest import plan
    from pipelines.stages import load_restorer
    from pipelines.storage import Store

    prepared = prepare(job)
    todo = plan(job, prepared.recipe.hash, prepared.protocol)
    restorer = load_restorer(prepared.weights, prepared.recipe)
    cost = estimate(todo, Store(job.source), restorer, max_pixels=int(job.max_megapixels * 1e6))
    print(f"images     {todo.matched} match: {len(todo.pairs)} to restore, {todo.finished} finished, ", end="")
    print(f"{len(todo.decided)} that cannot be")
    print(f"recipe     {todo.recipe}, protocol {prepared.protocol}")
    if cost.sampled:
        height, width = cost.largest
        tiles = f"{cost.tiles} tiles of {cost.tile} px" if cost.tile else "no tiles"
        print(f"megapixels about {cost.megapixels:.1f} (from {cost.sampled} images; largest {width}x{height}, {tiles})")
        print(f"memory     about {cost.memory_bytes / 2**30:.1f} GiB an actor")
        print(f"time       about {cost.seconds:.0f} s in the network with one actor like this machine")
    print("nothing was written")


def _job(given: dict[str, Any]) -> Any:
    from pydantic import ValidationError

    from pipelines.settings import RestoreJob

    try:
        return RestoreJob.model_validate(given)
    except ValidationError as error:
        lines = []
        for problem in error.errors(include_url=False, include_context=False, include_input=False):
            name = ".".join(str(part) for part in problem["loc"])
            option = f"--{name.replace('_', '-')}: " if name and name not in {"source", "output"} else f"{name}: "
            lines.append((option if name else "") + problem["msg"].removeprefix("Value error, "))
        raise ValueError("\n        ".join(lines)) from error


@contextmanager
def _clear_errors(code: int = 2) -> Iterator[None]:
    """What a person can mend is one message and an exit code, and a traceback only with -v."""
    expected: tuple[type[Exception], ...] = (ValueError, OSError)  # CheckpointError is a ValueError
    try:
        from pipelines.report import ReportError
        from pipelines.storage import StorageError

        expected += (StorageError, ReportError)
    except ModuleNotFoundError:
        pass  # the model library alone: no storage, no storage errors
    try:
        yield
    except expected as error:
        logging.getLogger(__name__).debug("where it was raised", exc_info=error)
        _fail(str(error), code=code)


def _score(value: float | None) -> str:
    return f"{'-':>8}" if value is None else f"{value:8.4f}"


def _fail(message: str, *, code: int = 2) -> None:
    print(f"nafnet: {message}", file=sys.stderr)
    raise typer.Exit(code)


def _counts(text: str, option: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"{option} takes numbers with commas between, such as 1,1,1,28; got {text!r}") from error


def _quiet(verbose: bool) -> None:
    """Our own lines to stderr; Ray's and Prefect's only when asked for. Must come before Prefect is imported."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    for name in ("nafnet", "pipelines"):
        logging.getLogger(name).addHandler(handler)
        logging.getLogger(name).propagate = False  # Prefect's root handler would say it again
        logging.getLogger(name).setLevel(logging.DEBUG if verbose else logging.INFO)
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    # Its temporary server takes longer than its default of 20 s on a busy machine.
    os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")
    if verbose:
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "warning")
    else:
        os.environ.setdefault("PREFECT_LOGGING_LEVEL", "CRITICAL")
        os.environ.setdefault("PREFECT_SERVER_LOGGING_LEVEL", "CRITICAL")
