"""A run against the published number: reproduced or not, and if not, why.

The verdict is on the means that the protocol asks for. What may explain a difference is tried on a sample of the data
set: the setting that moves the sample as far as the whole is off is named as the likely cause.
"""

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import matplotlib as mpl
import pyarrow as pa
import pyarrow.compute as pc
from matplotlib.figure import Figure

from nafnet import catalog
from nafnet import checkpoint as checkpoints
from nafnet.ablations import ABLATIONS
from nafnet.conventions import PROTOCOLS, Convention
from nafnet.recipe import Recipe
from pipelines.parts import write_parquet
from pipelines.records import Status
from pipelines.report import Summary
from pipelines.storage import Store
from pipelines.weights import locate

SAMPLE = 20  # images that an explanation is tried on
_RANGE_GUESS_DB = 20 * math.log10(255)  # added to an image whose float prediction is taken for 8-bit, or the reverse
_GUESS_MARGIN = 0.05  # of an image, by which the number of those may be off a whole one
_SAME_NUMBER = 0.005  # dB
# On GoPro: the first two are in NAFNet's paper (arXiv 2204.04676), the third is how MMagic scores.
_OTHERS = {
    "NAFNet-GoPro-width64": (
        (33.08, "tlc", "without TLC"),
        (33.65, "tiles", "in patches of the size it was trained on"),
        (33.7246, "rounding", "where predictions are not rounded"),
    )
}
_GIVE = "give the value to meet with --expect PSNR,SSIM"
_NAMED = 5  # missing images that are named


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far a run of one kind may be off and still count as the published one."""

    psnr: float  # dB
    ssim_3d: float


# Float32 without tiles is what was published. Other runs are rows of their own, which may differ by what a lower
# precision or tiles were measured to cost.
_EXACT, _CLOSE = Tolerance(0.01, 5e-4), Tolerance(0.05, 2e-3)


@dataclass(frozen=True, slots=True)
class Published:
    """The value to meet: `name` says whose it is. SSIM-3D is None where only a PSNR is in print."""

    name: str
    psnr: float
    ssim_3d: float | None
    images: int | None


@dataclass(frozen=True, slots=True)
class Cause:
    """Why a number may be off: in words, and what was seen (dB or SSIM) where a sample was run."""

    name: str
    words: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a run came to against the published value. `kind` is what sets the tolerance, such as "bf16, tiled"."""

    data: str
    checkpoint: str
    kind: str
    published: Published
    tolerance: Tolerance
    images: int
    psnr: float | None
    ssim_3d: float | None
    problems: tuple[str, ...]
    causes: tuple[Cause, ...] = ()
    tried: tuple[str, ...] = ()  # names of what was run on a sample
    not_tried: tuple[str, ...] = ()  # what was to be run, and what came in the way

    @property
    def reproduced(self) -> bool:
        """Whether nothing speaks against it."""
        return not self.problems

    @property
    def psnr_off(self) -> float | None:
        """Ours less the published PSNR, dB."""
        return None if self.psnr is None else self.psnr - self.published.psnr

    @property
    def ssim_off(self) -> float | None:
        """Ours less the published SSIM-3D."""
        return None if None in (self.ssim_3d, self.published.ssim_3d) else self.ssim_3d - self.published.ssim_3d  # type: ignore[operator]


def default_checkpoint(data: str) -> str:
    """The catalog row with the best published PSNR on `data`."""
    rows = [row for row in catalog.CATALOG.values() if row.protocol == data and row.psnr is not None]
    return max(rows, key=lambda row: row.psnr or 0).name


def published(name: str, data: str) -> Published:
    """The published value of a catalog row or of an ablation on `data`.

    Raises:
        ValueError: no such row, or none for that data set.
    """
    images = PROTOCOLS[data].images
    if entry := catalog.CATALOG.get(name):
        if entry.psnr is None or entry.protocol != data:
            raise ValueError(
                f"nothing is published of {name} on {data}: give the value to meet with --expect PSNR,SSIM"
            )
        return Published(name, entry.psnr, entry.ssim_3d, images)
    if row := ABLATIONS.get(name):
        value = {"gopro": row.psnr_gopro, "sidd": row.psnr_sidd}.get(data)
        if value is not None:
            return Published(name, value, None, images)
    raise ValueError(f"nothing is published of {name!r} on {data}: nafnet info lists what is; or {_GIVE}")


def check_row(name: str, data: str, weights: str) -> None:
    """Nothing, where the network of a checkpoint (file, URL, catalog name) is that of an ablation row.

    Raises:
        CheckpointError, ValueError: it cannot be read, or is another network.
    """
    config = checkpoints.load(locate(weights)).network.config
    wanted = ABLATIONS[name].config(data)  # type: ignore[arg-type]  # it raises for one it has not
    others = [
        f"{one.name} is {getattr(config, one.name)}, the row's {getattr(wanted, one.name)}"
        for one in fields(config)
        if getattr(config, one.name) != getattr(wanted, one.name)
    ]
    if others:
        raise ValueError(
            f"{weights} is not the network of {name}: {'; '.join(others)}. A .pth tells neither sigma nor activation: "
            "write such a network with nafnet.checkpoint.save, whose header does"
        )


def kind(recipe: Recipe, summary: Summary) -> tuple[str, Tolerance]:
    """What sort of run it was, and its tolerance."""
    precisions = {recipe.precision, *summary["other_precisions"]} - {"float32"}
    words = [*sorted(precisions), *(["tiled"] if summary["tiled"] else [])]
    if recipe.strength < 1 or recipe.self_ensemble or len(recipe.steps) > 1:
        words.append("not the published inference")
    return (", ".join(words), _CLOSE) if words else ("float32, whole images", _EXACT)


def judge(rows: pa.Table, summary: Summary, recipe: Recipe, goal: Published, *, data: str, checkpoint: str) -> Verdict:
    """Compare the means of a run's rows (all of the data set, `report.read_rows`) with the published value."""
    words, tolerance = kind(recipe, summary)
    problems = _incomplete(rows, summary, goal)
    verdict = Verdict(
        data, checkpoint, words, goal, tolerance, summary["images"], summary["psnr"], summary["ssim_3d"], ()
    )
    convention = Convention.parse(summary["protocols"][0]) if len(summary["protocols"]) == 1 else None
    if convention is not None and convention.name != data:
        problems.append(f"scored as {convention.name} ({convention.words}), which is not {data}'s protocol")
    if verdict.psnr_off is None:
        problems.append("no image has a PSNR: nothing was scored")
    elif not abs(verdict.psnr_off) <= tolerance.psnr:
        problems.append(f"PSNR is off by {verdict.psnr_off:+.4f} dB, more than {tolerance.psnr:g}")
    if goal.ssim_3d is not None and verdict.ssim_off is None:
        problems.append("no image has an SSIM-3D")
    elif verdict.ssim_off is not None and not abs(verdict.ssim_off) <= tolerance.ssim_3d:
        problems.append(f"SSIM-3D is off by {verdict.ssim_off:+.4f}, more than {tolerance.ssim_3d:g}")
    verdict = replace(verdict, problems=tuple(problems))
    causes = _read_off(summary, verdict)
    if convention is not None and convention.name != data:
        met = verdict.psnr_off is None or abs(verdict.psnr_off) <= tolerance.psnr
        if met or convention.rounds == Convention(data).rounds:  # else a sample shows what rounding does
            causes.append(Cause("protocol", f"these scores follow {convention.name}: take {data} and metrics authors"))
    return replace(verdict, causes=tuple(causes))


def _incomplete(rows: pa.Table, summary: Summary, goal: Published) -> list[str]:
    problems = []
    if goal.images is not None and summary["images"] != goal.images:
        problems.append(f"{summary['images']} images, the published mean is over {goal.images}")
    failed = summary["images"] - summary["counts"][Status.RESTORED.value]
    if failed:
        bad = rows.filter(pc.not_equal(rows["status"], Status.RESTORED.value)).slice(0, _NAMED).to_pylist()
        named = "; ".join(f"{row['key']} {row['status']}" for row in bad)
        problems.append(f"{failed} images were not restored: {named}{' ...' if failed > _NAMED else ''}")
    if summary["identical_restored"]:
        problems.append(f"{summary['identical_restored']} restored images equal their reference: left out of the mean")
    return problems


def _read_off(summary: Summary, verdict: Verdict) -> list[Cause]:
    """Causes that show in the numbers themselves."""
    causes, goal = [], verdict.published
    if goal.images is not None and summary["images"] != goal.images:
        few = "lacks" if summary["images"] < goal.images else "has more than it should by"
        count = abs(goal.images - summary["images"])
        causes.append(
            Cause("count", f"the data set {few} {count} image{'s' * (count > 1)}: nafnet datasets check names them")
        )
    missing = summary["counts"][Status.MISSING.value]
    if missing:
        causes.append(Cause("count", f"{missing} images have no reference: nafnet datasets check names them"))
    off, flat = verdict.ssim_off, summary["ssim_2d"]
    two = goal.ssim_3d is not None and flat is not None and abs(flat - goal.ssim_3d) <= verdict.tolerance.ssim_3d
    if two and (off is None or abs(off) > verdict.tolerance.ssim_3d):
        causes.append(
            Cause(
                "ssim-2d", f"the value to meet, {goal.ssim_3d:.4f}, is this run's SSIM-2D ({flat:.4f}), not its 3-D one"
            )
        )
    elif off is None and goal.ssim_3d is not None and flat is not None:
        causes.append(Cause("ssim-2d", "these scores hold the 2-D SSIM: the published one is 3-D (--metrics authors)"))
    shift = verdict.psnr_off
    if shift is not None and summary["scored"]:
        guessed = -shift * summary["scored"] / _RANGE_GUESS_DB
        if abs(shift) > verdict.tolerance.psnr and guessed > 0.9 and abs(guessed - round(guessed)) < _GUESS_MARGIN:
            causes.append(
                Cause("range", f"the difference is {round(guessed)} times {_RANGE_GUESS_DB:.2f} dB over all images: "
                      "where the value comes from, the data range of some was guessed from their values")
            )  # fmt: skip
    return causes + _known(verdict)


def _known(verdict: Verdict) -> list[Cause]:
    """Numbers that others are known to have got from the same checkpoint, on either side of the comparison."""
    causes = []
    for value, name, words in _OTHERS.get(verdict.checkpoint, ()):
        if verdict.psnr is not None and abs(verdict.psnr - value) <= _SAME_NUMBER:
            causes.append(Cause(name, f"{value:g} dB is what this checkpoint gives {words}"))
        elif abs(verdict.published.psnr - value) <= _SAME_NUMBER:
            causes.append(Cause(name, f"the value to meet, {value:g} dB, is what this checkpoint gives {words}"))
    return causes


@dataclass(frozen=True, slots=True)
class Trial:
    """Another setting that is tried on a sample: changes of the job's fields, and what it means if they explain it."""

    name: str
    words: str
    changes: Mapping[str, Any]


def trials(recipe: Recipe, convention: Convention, data: str, other_folder: Mapping[str, Any] | None) -> list[Trial]:
    """What is worth trying for this run. `other_folder` is what a job needs for GoPro's other blur, if it is there."""
    found = []
    if any(step.tlc for step in recipe.steps):
        found.append(Trial("tlc", "the value to meet seems to be one without TLC", {"tlc": False}))
    else:
        found.append(Trial("tlc", "TLC is off", {"tlc": True}))
    rounding = {"metrics": "authors", "crop_border": 0, "y_channel": False}
    right = Convention(data)
    if convention.rounds != right.rounds:
        words = "rounded" if convention.rounds else "not rounded"
        found.append(Trial("rounding", f"the prediction is {words} here", rounding | {"protocol": data}))
    else:
        words = "is not rounded" if convention.rounds else "is rounded"
        other = "sidd" if convention.rounds else "gopro"
        found.append(
            Trial("rounding", f"the prediction {words} where the value comes from", rounding | {"protocol": other})
        )
    if other_folder is not None:
        found.append(
            Trial("blur_gamma", "the degraded images are from the wrong one of blur and blur_gamma", other_folder)
        )
    if recipe.tile != "whole":
        found.append(Trial("tiles", "the images were restored in tiles", {"tile": "whole"}))
    return found


def explains(verdict: Verdict, moved: float | None) -> bool:
    """Whether a setting that moves the sample's mean PSNR by `moved` dB accounts for the difference."""
    off = verdict.psnr_off
    if off is None or moved is None or abs(off) <= verdict.tolerance.psnr:
        return False
    return abs(-off - moved) <= max(0.35 * abs(off), verdict.tolerance.psnr) and abs(moved) > verdict.tolerance.psnr / 2


def sampled(keys: Sequence[str], count: int = SAMPLE) -> list[int]:
    """Positions of at most `count` keys, spread evenly."""
    step = max(1.0, len(keys) / count)
    return sorted({int(i * step) for i in range(min(count, len(keys)))})


def lines(verdict: Verdict) -> list[str]:
    """The verdict as a person reads it."""
    goal = verdict.published
    rows = [("PSNR", verdict.psnr, goal.psnr, verdict.psnr_off, verdict.tolerance.psnr, " dB")]
    if goal.ssim_3d is not None:
        rows.append(("SSIM-3D", verdict.ssim_3d, goal.ssim_3d, verdict.ssim_off, verdict.tolerance.ssim_3d, ""))
    text = [
        f"data set   {verdict.data}, {verdict.images} images",
        f"run        {verdict.checkpoint}, {verdict.kind}",
        f"           {'ours':>9} {'published':>9} {'off by':>9}",
    ]
    for name, ours, theirs, off, tolerance, unit in rows:
        shown = "-" if ours is None else f"{ours:.4f}"
        difference = "-" if off is None else f"{off:+.4f}"
        text.append(f"{name:<10} {shown:>9} {theirs:9.4f} {difference:>9}{unit}  (tolerance {tolerance:g})")
    text.append(f"verdict    {'reproduced' if verdict.reproduced else 'NOT reproduced'}: {goal.name}")
    text += [f"           {problem}" for problem in verdict.problems]
    text += [f"cause      {cause.words}" for cause in verdict.causes]
    if verdict.problems and not verdict.causes:
        tried = f"not found: none of the usual ones explains it (tried on a sample: {', '.join(verdict.tried)})"
        text.append(f"cause      {tried if verdict.tried else 'not looked for on a sample'}")
    text += [f"           could not be tried: {words}" for words in verdict.not_tried]
    return text


def write_verdict(output: Store, verdict: Verdict) -> None:
    """Write `verdict.json` beside the run's report."""
    content = asdict(verdict) | {"reproduced": verdict.reproduced}
    output.write("verdict.json", json.dumps(content, indent=2, allow_nan=False).encode() + b"\n")


def read_verdict(output: Store) -> Verdict:
    """The verdict that `write_verdict` wrote."""
    content = json.loads(output.read("verdict.json"))
    del content["reproduced"]
    return Verdict(
        **content
        | {
            "published": Published(**content["published"]),
            "tolerance": Tolerance(**content["tolerance"]),
            "problems": tuple(content["problems"]),
            "causes": tuple(Cause(**cause) for cause in content["causes"]),
            **{name: tuple(content[name]) for name in ("tried", "not_tried")},
        }
    )


def write_table(output: Store, verdicts: Sequence[Verdict]) -> dict[str, str]:
    """The published table with ours beside it as `benchmark.md`, `.parquet` and `.svg`; returns their URLs."""
    rows = [
        {
            "data": verdict.data,
            "checkpoint": verdict.checkpoint,
            "against": verdict.published.name,
            "run": verdict.kind,
            "images": verdict.images,
            "psnr_published": verdict.published.psnr,
            "psnr": verdict.psnr,
            "psnr_off": verdict.psnr_off,
            "ssim_3d_published": verdict.published.ssim_3d,
            "ssim_3d": verdict.ssim_3d,
            "ssim_3d_off": verdict.ssim_off,
            "reproduced": verdict.reproduced,
            "cause": "; ".join(cause.words for cause in verdict.causes) or None,
        }
        for verdict in verdicts
    ]
    write_parquet(output, "benchmark.parquet", pa.Table.from_pylist(rows, schema=_TABLE))
    output.write("benchmark.md", table_markdown(verdicts).encode())
    output.write("benchmark.svg", table_plot(verdicts))
    return {name: output.url(f"benchmark.{ending}") for name, ending in _FORMATS.items()}


_FORMATS = {"table": "md", "rows": "parquet", "plot": "svg"}
_TABLE = pa.schema(
    [
        *((name, pa.string()) for name in ("data", "checkpoint", "against", "run")),
        ("images", pa.int64()),
        *((name, pa.float64()) for name in ("psnr_published", "psnr", "psnr_off")),
        *((name, pa.float64()) for name in ("ssim_3d_published", "ssim_3d", "ssim_3d_off")),
        ("reproduced", pa.bool_()),
        ("cause", pa.string()),
    ]
)


_HEAD = (
    ("Data set", "Checkpoint", "Against", "Run"),
    ("PSNR published", "ours", "off by", "SSIM-3D published", "ours", "off by"),
    ("",),
)


def table_markdown(verdicts: Sequence[Verdict]) -> str:
    """One line a run, in the order they were made; columns line up, for a terminal."""
    words, numbers, last = _HEAD
    table = [[*words, *numbers, *last]]
    for verdict in verdicts:
        goal = verdict.published
        table.append(
            [
                *(verdict.data, verdict.checkpoint.replace("|", "\\|"), goal.name, verdict.kind),
                *(_number(goal.psnr), _number(verdict.psnr), _number(verdict.psnr_off, "+")),
                *(_number(goal.ssim_3d), _number(verdict.ssim_3d), _number(verdict.ssim_off, "+")),
                "reproduced" if verdict.reproduced else "not reproduced",
            ]
        )
    widths = [max(3, *map(len, column)) for column in zip(*table, strict=True)]
    right = range(len(words), len(words) + len(numbers))
    rule = ["-" * (width - 1) + ":" if i in right else "-" * width for i, width in enumerate(widths)]
    lines = [
        [cell.rjust(widths[i]) if i in right else cell.ljust(widths[i]) for i, cell in enumerate(row)]
        for row in (table[0], rule, *table[1:])
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _number(value: float | None, sign: str = "") -> str:
    return "" if value is None else f"{value:{sign}.4f}"


def table_plot(verdicts: Sequence[Verdict]) -> bytes:
    """Every run's distance from its published PSNR in units of its tolerance, as SVG: inside the band is reproduced."""
    figure = Figure(figsize=(7, 1.2 + 0.34 * len(verdicts)), layout="constrained")
    axes = figure.add_subplot()
    axes.axvspan(-1, 1, color="#2a7", alpha=0.15, linewidth=0)
    axes.axvline(0, color="#888", linewidth=0.8)
    places = range(len(verdicts))[::-1]
    for place, verdict in zip(places, verdicts, strict=True):
        if verdict.psnr_off is None:
            continue
        distance = verdict.psnr_off / verdict.tolerance.psnr
        shown = max(-_SHOWN, min(_SHOWN, distance))
        axes.plot(shown, place, "o", color="#2a7" if verdict.reproduced else "#c33", markersize=6)
        axes.annotate(
            f"{verdict.psnr_off:+.4f} dB", (shown, place), xytext=(7, -3), textcoords="offset points", fontsize=8
        )
    names = [
        f"{goal if goal in ABLATIONS else verdict.checkpoint.rpartition('/')[2]}, {verdict.data}, {verdict.kind}"
        for verdict in verdicts
        for goal in (verdict.published.name,)
    ]
    axes.set_yticks(list(places), names, fontsize=8)
    axes.set(xlim=(-_SHOWN - 0.5, _SHOWN + 2.5), xlabel="PSNR, ours less published, in units of the tolerance")
    axes.spines[["top", "right", "left"]].set_visible(False)
    file = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "benchmark"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


_SHOWN = 5.0  # tolerances; what is farther off stands at the edge
