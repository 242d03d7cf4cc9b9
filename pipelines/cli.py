"""The `nafnet` command. Ray and Prefect are loaded by the commands that need them, so the others start at once."""

import atexit
import gc
import json
import math
import re
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal

import torch
import typer

from nafnet import catalog, checkpoint
from nafnet.ablations import ABLATIONS, PUBLISHED_LAYOUT, Ablation, Data, near, select
from nafnet.conventions import Convention, ProfileName, ProtocolName, label
from nafnet.memory import process_bytes
from nafnet.model import Activation, Attention, NetConfig, Network, Norm, Sigma, parameters
from nafnet.recipe import Precision
from nafnet.tlc import windows
from pipelines import cli_datasets, cli_report
from pipelines.cli_benchmark import benchmark
from pipelines.cli_common import (
    RayAddress,
    Storage,
    clear_errors,
    end_early,
    end_together,
    fail,
    job_of,
    quiet,
    use_storage,
)
from pipelines.cli_doctor import doctor

app = typer.Typer(
    help="Restore, score and account for image collections with NAFNet.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,  # locals may hold what must not be printed
    context_settings={"help_option_names": ["-h", "--help"]},
)

Metrics = Annotated[ProfileName, typer.Option(help="Whose way of computing scores is followed.")]
CropBorder = Annotated[int, typer.Option(help="Margin that basicsr and mmagic leave out of scores, px.")]
YChannel = Annotated[bool, typer.Option("--y-channel", help="Score the luma alone, under basicsr and mmagic.")]
_PLANNED: tuple[Precision, Precision] = ("float32", "bf16")
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show what Ray and Prefect say too.")]


@app.command()
def restore(
    source: Annotated[
        str,
        typer.Argument(
            help="Degraded images, at a path or an fsspec URL: a folder; an .lmdb, .mat or .tar (x-{000..023}.tar for "
            "several); or a list (.csv, .jsonl, .parquet) with the columns source and reference."
        ),
    ],
    output: Annotated[str, typer.Argument(help="Prefix to write images/, report/ and report.html to.")],
    reference: Annotated[
        str | None, typer.Option(help="Sharp originals under the same relative names, to score against.")
    ] = None,
    pair: Annotated[
        str | None,
        typer.Option(
            metavar="OLD=NEW",
            help="How references are named: that folder of the key, or else that part of the file's name, is replaced.",
        ),
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
        typer.Option(help="Processes that hold the network. Default: one for four free CPUs, or all free GPUs."),
    ] = None,
    max_actors: Annotated[
        int | None, typer.Option(help="Up to so many as CPUs or GPUs become free and nodes join. Default: no more.")
    ] = None,
    gpus_per_actor: Annotated[float, typer.Option(help="GPUs each actor reserves; 0 restores on the CPU.")] = 0,
    ray_address: RayAddress = "local",
    ray_wheel: Annotated[
        str | None,
        typer.Option(help="With http://: a wheel of this package to run there. Default: what the cluster has."),
    ] = None,
    time_limit: Annotated[
        float | None, typer.Option(help="Hours after which the run stops; the same again goes on.")
    ] = None,
    include: Annotated[
        list[str] | None,
        typer.Option(help="Glob of the keys to restore; may repeat. Default: the image extensions."),
    ] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Glob of the keys to leave out; may repeat.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first so many keys, in order of their names.")] = None,
    max_failed: Annotated[int, typer.Option(help="How many images may fail before the run ends red.")] = 0,
    retry_failed: Annotated[bool, typer.Option(help="Also redo what an earlier run could not restore.")] = False,
    fresh: Annotated[
        bool,
        typer.Option(
            "--fresh", help="Start anew: what earlier runs reported does not count. Leave it out to go on after a stop."
        ),
    ] = False,
    max_megapixels: Annotated[float, typer.Option(help="Images larger than this are refused.")] = 250,
    storage: Storage = None,
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
    quiet(verbose)
    with clear_errors():
        job = job_of(given)
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
    storage: Storage = None,
) -> None:
    """Score images that are already there: PSNR in dB and SSIM, per image and as plain means.

    Written images are rounded already, so mmagic gives the PSNR of basicsr here; restore scores before it rounds.
    """
    from pipelines.score import score_folders

    count = failed = 0
    with clear_errors():
        use_storage(storage)
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
        fail(f"{failed} images could not be scored", code=1)


@app.command()
def compare(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN_A RUN_B ...",
            help="Outputs of nafnet restore, paths or fsspec URLs; each is compared with the first.",
        ),
    ],
    output: Annotated[str, typer.Option(help="Prefix to write compare.html and compare.json to.")] = "comparison",
    tolerance: Annotated[float, typer.Option(help="Largest PSNR difference of an image that counts as equal, dB.")] = (
        0.01
    ),
    storage: Storage = None,
) -> None:
    """Say whether runs have the same recipe and the same pixels, how far apart they are, and what each cost.

    Ends with 0 when all are identical to the first or equal within tolerance, with 1 when they are not, and with 2
    when there is no run at one of the places.
    """
    from pipelines import compare as comparing
    from pipelines.compare_html import write_comparison
    from pipelines.storage import Store

    with clear_errors():
        use_storage(storage)
        comparison = comparing.compare([comparing.load_run(run) for run in runs], tolerance)
        page = write_comparison(Store(output), comparison)
    print(comparing.terminal(comparison))
    print(f"report  {page}")
    if not comparison.alike:
        raise typer.Exit(1)


app.command()(benchmark)
app.command()(doctor)
app.add_typer(cli_datasets.app, name="datasets")
app.add_typer(cli_report.app, name="report")


@app.command()
def info(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME",
            help="A file, a URL, a catalog name, or an ablation of the paper (table1/plainnet; table1 for all of its "
            "rows). Left out: list the catalog and the ablations, or describe the network of the options.",
        ),
    ] = None,
    size: Annotated[str, typer.Option(metavar="WIDTHxHEIGHT", help="Image for arithmetic and memory, px.")] = "256x256",
    data: Annotated[Data | None, typer.Option(help="Whose block layout an ablation gets. Default: gopro.")] = None,
    train_size: Annotated[
        int | None,
        typer.Option(help="Side of the training crops in px (TLC window). Default: what the file says, else 256."),
    ] = None,
    width: Annotated[int | None, typer.Option(help="Channels at full resolution. Default: 32.")] = None,
    enc_blocks: Annotated[str | None, typer.Option(help="Blocks of each encoder level. Default: 1,1,1,28.")] = None,
    middle_blocks: Annotated[int | None, typer.Option(help="Blocks in the middle. Default: 1.")] = None,
    dec_blocks: Annotated[
        str | None, typer.Option(help="Blocks of each decoder level, deepest first. Default: 1,1,1,1.")
    ] = None,
    norm: Annotated[Norm | None, typer.Option(help="Normalisation. Default: layer.")] = None,
    activation: Annotated[Activation | None, typer.Option(help="Activation or gate. Default: gate.")] = None,
    attention: Annotated[Attention | None, typer.Option(help="Channel attention. Default: sca.")] = None,
    gate_sigma: Annotated[
        Sigma | None, typer.Option(help="What acts on one half of the gate. Default: identity.")
    ] = None,
    dw_expand: Annotated[
        int | None, typer.Option(help="Growth of channels before the depthwise convolution. Default: 2.")
    ] = None,
    ffn_expand: Annotated[
        int | None, typer.Option(help="Growth of channels in a block's second half. Default: 2.")
    ] = None,
    image_channels: Annotated[int | None, typer.Option(help="3 for RGB, 1 for grey. Default: 3.")] = None,
) -> None:
    """Say what a network is and takes: parameters, arithmetic, TLC windows, memory, and its published scores.

    The network is a checkpoint's, an ablation's, or any other by the options of nafnet train.
    """
    shape = {
        "width": width,
        "enc_blocks": enc_blocks,
        "middle_blocks": middle_blocks,
        "dec_blocks": dec_blocks,
        "norm": norm,
        "activation": activation,
        "attention": attention,
        "gate_sigma": gate_sigma,
        "dw_expand": dw_expand,
        "ffn_expand": ffn_expand,
        "image_channels": image_channels,
    }
    quiet(verbose=False)  # which shows how far a file that is fetched has come
    given = {dial: value for dial, value in shape.items() if value is not None}
    problems: list[str] = []
    rows: list[Ablation] | None = None
    with clear_errors():
        with _noting(problems):
            image = _image_size(size)
        with _noting(problems):
            rows = _ablations(name)
        described = _configured(given, problems) if given else None
        if train_size is not None and not given and (name is None or (rows and len(rows) > 1)):
            problems.append("--train-size needs one network, and this is a list: leave it out")
        elif train_size is not None and train_size < 1:
            problems.append(f"--train-size is a number of px, got {train_size}")
        else:
            with _noting(problems):  # which a network may be too deep for
                for config in [described] if described else [row.config(data or "gopro") for row in rows or ()]:
                    windows(config, train_size or 256)
        if name is not None and given:
            options = ", ".join(f"--{dial.replace('_', '-')}" for dial in given)
            problems.append(f"{name} has a shape of its own: leave out {options}, or the name")
        if data and (given or (name is not None and rows == [])):
            problems.append("--data lays out the blocks of an ablation: take --enc-blocks and its kin, or leave it out")
        if problems:
            raise ValueError("\n        ".join(problems))
        if described:
            print("no checkpoint: the network that these options describe")
            _describe(described, image, train_size or 256)
        elif name is None:
            _list_catalog()
            print()
            _list_ablations(list(ABLATIONS.values()), data or "gopro", image)
        elif rows and len(rows) > 1:
            _list_ablations(rows, data or "gopro", image)
        elif rows:
            _describe_ablation(rows[0], data or "gopro", image, train_size or 256)
        else:
            _describe_checkpoint(name, image, train_size)


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

    with clear_errors():
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
    quiet(verbose)
    from pipelines.demo import SIGMA, make_photos

    degraded, original = make_photos(folder)
    print(f"photographs with noise of sigma {SIGMA:g}: {degraded}")
    with clear_errors():
        job = job_of({"source": str(degraded), "output": str(folder / "restored"), "reference": str(original)})
    _run_restore(job)


def main() -> None:
    """Entry point of the console script."""
    atexit.register(gc.freeze)  # else what Ray, Prefect and torch have made is looked through once more: 1 s
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


def _list_catalog() -> None:
    print(f"{'name':<24} {'PSNR':>8} {'SSIM-3D':>8}  TLC  protocol")
    for row in catalog.CATALOG.values():
        scores = f"{row.psnr:8.4f} {row.ssim_3d:8.4f}" if row.psnr else f"{'-':>8} {'-':>8}"
        print(f"{row.name:<24} {scores}  {'on ' if row.tlc else 'off'}  {row.protocol}")


def _list_ablations(rows: list[Ablation], data: Data, image: tuple[int, int]) -> None:
    print(f"{'ablation, ' + data + ' layout':<24} blocks  parameters   GMACs   SIDD  GoPro")
    for row in rows:
        count, adds = _costs(row.config(data), *image)
        scores = f"{row.psnr_sidd:.2f}  {row.psnr_gopro:.2f}"
        print(f"{row.name:<24} {row.blocks:>6} {count / 1e6:>9.2f} M {adds / 1e9:>7.2f}  {scores}")
    print(f"GMACs at {image[1]}x{image[0]}; PSNR in dB as the paper prints it, of networks trained for each data set")


def _describe_ablation(row: Ablation, data: Data, image: tuple[int, int], train_size: int) -> None:
    print(f"{row.name}: {row.blocks} blocks in the {data} layout")
    _describe(row.config(data), image, train_size)
    if row.blocks != PUBLISHED_LAYOUT:
        print("  layout      chosen here: the paper prints the number of blocks alone")
    scores = f"{row.psnr_sidd:.2f} dB on SIDD, {row.psnr_gopro:.2f} dB on GoPro"
    print(f"  published   {scores} (Table {row.table}, learning rate {row.learning_rate:g})")
    if row.latency_ms:
        print(f"  latency     {row.latency_ms:g} ms at 1280x720 as published")


def _describe_checkpoint(name: str, image: tuple[int, int], train_size: int | None) -> None:
    """A file; or what the catalog knows of one that is not on this machine, which is not fetched for this."""
    from pipelines.cache import cache_folder
    from pipelines.weights import locate

    entry = catalog.CATALOG.get(name)
    if entry and not entry.bundled and not (cache_folder() / entry.file).is_file():
        print(f"{name}\n  file        not at {cache_folder() / entry.file}")
        print(f"  sha256      {entry.sha256 or 'not known'}")
        _describe(entry.config, image, train_size or entry.train_size)
    else:
        path = locate(name)
        loaded = checkpoint.load(path)
        entry = entry or catalog.find_hash(loaded.sha256)
        print(f"{path}\n  sha256      {loaded.sha256}")
        known = train_size or loaded.train_size or (entry.train_size if entry else 256)
        _describe(loaded.network.config, image, known)
    print(f"  catalog     {entry.name if entry else 'not in the catalog'}")
    if entry and entry.psnr:
        tlc = "with" if entry.tlc else "without"
        print(f"  published   {entry.psnr:.4f} dB, SSIM-3D {entry.ssim_3d:.4f} ({entry.protocol}, {tlc} TLC)")


def _describe(config: NetConfig, image: tuple[int, int], train_size: int) -> None:
    """What any network is, and takes for a whole image of (height, width) px."""
    at = f"{image[1]}x{image[0]}"
    sides = ", ".join(str(side) for side in windows(config, train_size))
    count, adds = _costs(config, *image)
    gate = f" (sigma {config.sigma})" if config.activation == "gate" else ""
    print(f"  network     {config.family}, width {config.width}")
    print(
        f"  dials       norm {config.norm}, activation {config.activation}{gate}, attention {config.attention}", end=""
    )
    print(f", dw_expand {config.dw_expand}, ffn_expand {config.ffn_expand}, image_channels {config.image_channels}")
    print(f"  blocks      encoder {config.enc_blocks}, middle {config.middle_blocks}, decoder {config.dec_blocks}")
    print(f"  parameters  {count:,}")
    print(f"  arithmetic  {adds / 1e9:.2f} G multiply-adds at {at}")
    print(f"  memory      on a CPU {_memory(config, image, 'cpu')} (a process, the whole {at})")
    print(f"              on a GPU {_memory(config, image, 'cuda')}")
    if config.attention == "none":
        print("  TLC windows none, there is no attention")
    else:
        print(f"  TLC windows {sides} px by level (trained on {train_size} px crops)")


def _memory(config: NetConfig, image: tuple[int, int], device: str) -> str:
    full, half = (process_bytes([config], *image, precision=p, device=device) for p in _PLANNED)
    return f"about {full / 2**20:,.0f} MiB in float32, {half / 2**20:,.0f} MiB in bf16"


@lru_cache
def _costs(config: NetConfig, height: int, width: int) -> tuple[int, int]:
    """Parameters, and what `nafnet.model.multiply_adds` counts: from the shapes, which takes a tenth of the time."""
    with torch.device("meta"):
        network = Network(config)
    depth, adds = config.levels, 0
    height, width = height + -height % config.stride, width + -width % config.stride
    for name, conv in network.named_modules():
        if not isinstance(conv, torch.nn.Conv2d):
            continue
        group, _, rest = name.partition(".")
        i = int(rest.partition(".")[0] or 0)
        levels = {"encoders": i, "downs": i + 1, "middle_blks": depth, "ups": depth - i, "decoders": depth - 1 - i}
        level = levels.get(group, 0)
        pooled = ".sca." in name or ".se." in name
        adds += conv.weight.numel() * (1 if pooled else (height >> level) * (width >> level))
    return parameters(network), adds


def _configured(given: dict[str, Any], problems: list[str]) -> NetConfig | None:
    """The network of these options; None, and why in `problems`, when there is none."""
    fields = dict(given)
    before = len(problems)
    for blocks in ("enc_blocks", "dec_blocks"):
        with _noting(problems):
            if blocks in fields:
                fields[blocks] = _counts(fields[blocks], f"--{blocks.replace('_', '-')}")
    if len(problems) == before:
        with _noting(problems):
            return NetConfig(sigma=fields.pop("gate_sigma", "identity"), **fields)
    return None


def _ablations(name: str | None) -> list[Ablation]:
    """The rows that this name, table or glob stands for; none for a checkpoint."""
    if name is None or name in catalog.CATALOG or "://" in name or Path(name).expanduser().is_file():
        return []
    try:
        return select(name)
    except ValueError as error:
        names = near(name, [*catalog.CATALOG, *ABLATIONS])
        hint = f"near it are {', '.join(names)}" if names else "nafnet info lists the names"
        path = Path(name).expanduser().absolute()
        raise ValueError(f"no file at {path}, and no catalog entry or ablation of that name: {hint}") from error


def _image_size(text: str) -> tuple[int, int]:
    """Height and width, px."""
    sides = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if sides is None:
        raise ValueError(f"--size takes WIDTHxHEIGHT in px, such as 1280x720; got {text!r}")
    return int(sides[2]), int(sides[1])


@contextmanager
def _noting(problems: list[str]) -> Iterator[None]:
    """Go on after a mistake, so that all of them are said at once."""
    try:
        yield
    except ValueError as error:
        problems.append(str(error))


def _run_restore(job: Any) -> None:
    from pipelines.flows import INCOMPLETE
    from pipelines.flows import restore as flow
    from pipelines.report import count_line
    from pipelines.storage import Store

    end_together()
    state = flow(**job.model_dump(), return_state=True)
    if not state.is_completed() and state.name != INCOMPLETE:
        end_early(state)
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
        fail(f"{state.message}: the report says which and why; --retry-failed tries those again", code=1)


def _dry_run(job: Any) -> None:
    from nafnet.memory import available_bytes
    from pipelines.actor import load_restorer
    from pipelines.containers import open_collection
    from pipelines.engine import Placement, this_machine
    from pipelines.estimate import estimate
    from pipelines.flows import prepare
    from pipelines.manifest import plan
    from pipelines.storage import Store

    prepared = prepare(job)
    memory = None
    if job.ray_address == "local" and not job.gpus_per_actor:  # else its actors are on machines that are not seen here
        pool, threads = this_machine().pool(Placement(actors=job.actors, max_actors=job.max_actors))
        torch.set_num_threads(threads)
        memory = available_bytes(share=pool.memory_share())
    restorer = load_restorer(prepared.weights, prepared.recipe, memory=memory)
    with TemporaryDirectory() as folder:
        todo = plan(job, prepared.recipe.hash, prepared.protocol, place=Store(folder))
        cost = estimate(todo, open_collection(todo.source), restorer, max_pixels=int(job.max_megapixels * 1e6))
    print(f"images     {todo.matched} match: {todo.to_restore} to restore, {todo.finished} finished, ", end="")
    print(f"{todo.decided} that cannot be")
    print(f"recipe     {todo.recipe}, protocol {prepared.protocol}")
    if cost.sampled:
        height, width = cost.largest
        tiles = f"{cost.tiles} tiles of {cost.tile} px" if cost.tile else "no tiles"
        print(f"megapixels about {cost.megapixels:.1f} (from {cost.sampled} images; largest {width}x{height}, {tiles})")
        print(f"memory     about {cost.memory_bytes / 2**30:.1f} GiB an actor")
        print(f"time       about {cost.seconds:.0f} s in the network with one actor like this machine")
    print("nothing was written")


def _score(value: float | None) -> str:
    return f"{'-':>8}" if value is None else f"{value:8.4f}"


def _counts(text: str, option: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"{option} takes numbers with commas between, such as 1,1,1,28; got {text!r}") from error
