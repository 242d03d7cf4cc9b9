"""Verdicts: green where the reference's own arithmetic says so, red with the right cause for each known mistake.

The flows are the real ones on a real Prefect server. Ray's part is done by the same stages called in a row, but for one
run of the command itself.
"""

import hashlib
import json
import math
import re
import shutil
import subprocess
import sys
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

from nafnet import ablations, catalog, checkpoint
from nafnet.images import decode
from nafnet.model import NetConfig
from pipelines import benchmark, check, datasets, engine, flows, made, manifest, report
from pipelines.cli import app
from pipelines.containers import open_collection
from pipelines.made import LAYOUTS, make
from pipelines.stages import Work
from pipelines.storage import Store
from tests.conftest import random_network, save_published
from tests.nafnet import reference
from tests.nafnet.test_metrics import dense_ssim_3d

pytestmark = pytest.mark.usefixtures("prefect_server")

SIZE = (72, 96)
CROP = 16  # a TLC window of 24 px, which these images exceed


def network(strength: float = 3, attention: float = 300) -> torch.nn.Module:
    """Strong: what it adds depends on its local means, which TLC changes. Weak: so near that rounding shows."""
    made_of = random_network(NetConfig(width=8, enc_blocks=(1, 1), middle_blocks=1, dec_blocks=(1, 1)), seed=1)
    with torch.no_grad():
        made_of.ending.weight.mul_(strength)
        made_of.ending.bias.zero_()
        for name, parameter in made_of.named_parameters():
            if name.endswith("sca.1.weight"):
                parameter.mul_(attention)
            if name.endswith("sca.1.bias"):
                parameter.zero_()
    return made_of


WEAK = (0.3, 100)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_published(tmp_path_factory.mktemp("weights") / "net.pth", network())


@pytest.fixture(autouse=True)
def small(without_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NAFNET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(made, "_BLOCK_PX", 32)


def expected(
    data: datasets.DataName, url: Path, *, tlc: bool, rounds: bool, net: torch.nn.Module | None = None
) -> tuple[float, float]:
    """PSNR and SSIM-3D of the paper's equations, dense windows and all, over the files as they lie there."""
    found = datasets.find(data, str(url))
    source, references = open_collection(found.source), open_collection(str(found.reference))
    net = net or network()
    entries = [entry for entry in source.list() if datasets.matches(entry.key, found.include)]
    partners = datasets.partners(entries, list(references.list()), found.pair)
    scores = []
    for entry, there in zip(entries, partners, strict=True):
        if there is None:
            continue
        degraded, sharp = decode(source.read(entry.key)).pixels, decode(references.read(there.key)).pixels
        image = torch.from_numpy(degraded.astype(np.float32) / 255).permute(2, 0, 1)[None]
        with torch.no_grad():
            made_of = reference.network(net.state_dict(), image, train_size=CROP if tlc else None)
        values = made_of[0].permute(1, 2, 0).numpy().clip(0, 1).astype(np.float64)
        if rounds:
            values, target, top = np.rint(values * 255), sharp.astype(np.float64), 255.0
        else:
            target, top = sharp / 255, 1.0
        mse = np.square(values - target).mean()
        scores.append((10 * math.log10(top**2 / mse), dense_ssim_3d(values, target, top)))
    return tuple(np.mean(scores, axis=0))  # type: ignore[return-value]


def run(tmp_path: Path, data: str, weights: Path, score: tuple[float, float], **more: Any) -> benchmark.Verdict:
    parameters = {"data": data, "url": str(tmp_path / "set"), "output": str(tmp_path / "out")}
    parameters |= {"checkpoint": str(weights), "expect_psnr": score[0], "expect_ssim_3d": score[1]}
    settings: dict[str, Any] = {"train_size": CROP, "tlc": data != "sidd", **parameters, **more}
    state = flows.benchmark(**settings, return_state=True)
    verdict = benchmark.read_verdict(Store(str(tmp_path / "out")))
    assert state.is_completed() == verdict.reproduced
    if not verdict.reproduced:
        assert state.name == flows.NOT_REPRODUCED
    return verdict


def causes(verdict: benchmark.Verdict) -> list[str]:
    return [cause.name for cause in verdict.causes]


@pytest.mark.parametrize(
    ("data", "layout"),
    [(data, layout) for data, layouts in LAYOUTS.items() for layout in layouts if layout != "benchmark"],
)
def test_each_format_meets_the_reference_arithmetic(tmp_path: Path, weights: Path, data: Any, layout: str) -> None:
    """Without Prefect, which a format does not concern."""
    make(data, tmp_path / "set", images=1 if data == "sidd" else 4, layout=layout, size=SIZE)
    score = expected(data, tmp_path / "set", tlc=data != "sidd", rounds=data != "sidd")
    given = dict.fromkeys(signature(flows.benchmark.fn).parameters) | {
        "data": data,
        "url": str(tmp_path / "set"),
        "output": str(tmp_path / "out"),
        "checkpoint": str(weights),
        "expect_psnr": score[0],
        "expect_ssim_3d": score[1],
        "images": 32 if data == "sidd" else 4,
        "tlc": data != "sidd",
        "train_size": CROP,
        "metrics": "authors",
        "precision": "float32",
        "tile": "whole",
        "halo": 192,
        "gpus_per_actor": 0,
        "ray_address": "local",
    }
    found, goal, job = flows.benchmark_job(given)
    prepared = flows.prepare(job)
    plan = manifest.plan(job, prepared.recipe.hash, prepared.protocol)
    made_rows: list[pa.Table] = []
    engine.run(plan.tables(), prepared.work(plan.source, plan.reference), prepared.placement, made_rows.append)
    rows = pa.concat_tables(made_rows)
    summary = report.summarize(rows, recipe=prepared.recipe)
    verdict = benchmark.judge(rows, summary, prepared.recipe, goal, data=found.data, checkpoint="net")
    assert verdict.problems == ()
    assert verdict.psnr_off == pytest.approx(0, abs=1e-3)
    assert verdict.ssim_off == pytest.approx(0, abs=1e-5)
    assert verdict.kind == "float32, whole images"


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "folders"])
def test_pairs_of_ones_own_meet_it_too(tmp_path: Path, weights: Path, kind: str) -> None:
    flat = make("gopro", tmp_path / "set", images=3, layout="flat", size=SIZE)
    score = expected("gopro", flat, tlc=True, rounds=True)
    own = tmp_path / "own"
    for name, there in (("input", "a"), ("target", "b")):
        (own / there).mkdir(parents=True)
        for path in sorted((flat / "test" / name).iterdir()):
            path.rename(own / there / f"{path.stem}_{there}.png")
    pairs = [(f"a/{path.name}", f"b/{path.stem[:-1]}b.png") for path in sorted((own / "a").iterdir())]
    table = pa.table({"source": [a for a, _ in pairs], "reference": [b for _, b in pairs]})
    if kind == "csv":
        pa_csv.write_csv(table, own / "pairs.csv")
    elif kind == "jsonl":
        (own / "pairs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in table.to_pylist()))
    elif kind == "parquet":
        pq.write_table(table, own / "pairs.parquet")
    place = {"url": str(own / f"pairs.{kind}")}
    if kind == "folders":
        place = {"url": str(own / "a"), "reference": str(own / "b"), "pair": "_a=_b"}
    verdict = run(tmp_path, "gopro", weights, score, images=3, **place)
    assert verdict.reproduced, verdict.problems
    assert verdict.psnr_off == pytest.approx(0, abs=1e-3)


def test_a_set_in_a_bucket(tmp_path: Path, weights: Path, s3_folder: Path, s3_url: str) -> None:
    there = make("gopro", s3_folder / "bucket" / tmp_path.name, images=2, size=SIZE)
    url = f"{s3_url}/{tmp_path.name}"
    findings = check.check("gopro", url)
    assert (findings.images, findings.found.source) == (2, f"{url}/test")
    score = expected("gopro", there, tlc=True, rounds=True)
    assert run(tmp_path, "gopro", weights, score, images=2, url=url).reproduced


@pytest.fixture
def gopro(tmp_path: Path) -> Path:
    return make("gopro", tmp_path / "set", images=4, size=SIZE)


def test_tlc_off_is_named(tmp_path: Path, weights: Path, gopro: Path) -> None:
    score = expected("gopro", gopro, tlc=True, rounds=True)
    verdict = run(tmp_path, "gopro", weights, score, images=4, tlc=False)
    assert abs(verdict.psnr_off or 0) > 0.02
    assert causes(verdict) == ["tlc"]
    assert verdict.causes[0].words.startswith("TLC is off: on 4 images the other way moves PSNR by")


def test_a_value_without_tlc_is_named(tmp_path: Path, weights: Path, gopro: Path) -> None:
    verdict = run(tmp_path, "gopro", weights, expected("gopro", gopro, tlc=False, rounds=True), images=4)
    assert causes(verdict) == ["tlc"]
    assert "seems to be one without TLC" in verdict.causes[0].words


def test_wrong_rounding_is_named(tmp_path: Path, gopro: Path) -> None:
    """Degraded images are made the sharp ones, so that a high PSNR shows what rounding does."""
    weights = save_published(tmp_path / "weak.pth", network(*WEAK))
    for path in gopro.rglob("blur/*.png"):
        path.write_bytes((path.parents[1] / "sharp" / path.name).read_bytes())
    score = expected("gopro", gopro, tlc=True, rounds=True, net=network(*WEAK))
    verdict = run(tmp_path, "gopro", weights, score, images=4, protocol="sidd")
    assert abs(verdict.psnr_off or 0) > 0.01
    assert causes(verdict) == ["rounding"]
    assert verdict.causes[0].words.startswith("the prediction is not rounded here")
    assert any("which is not gopro's protocol" in problem for problem in verdict.problems)


def test_rounding_on_sidd_is_named(tmp_path: Path) -> None:
    """Pairs of one image each, as above."""
    weights = save_published(tmp_path / "weak.pth", network(*WEAK))
    flat = make("gopro", tmp_path / "set", images=3, layout="flat", size=SIZE)
    shutil.copytree(flat / "test" / "target", flat / "test" / "input", dirs_exist_ok=True)
    score = expected("gopro", flat, tlc=False, rounds=False, net=network(*WEAK))
    place = {"url": str(flat / "test" / "input"), "reference": str(flat / "test" / "target")}
    verdict = run(tmp_path, "sidd", weights, score, images=3, protocol="gopro", **place)
    assert abs(verdict.psnr_off or 0) > 0.01
    assert causes(verdict) == ["rounding"]
    assert verdict.causes[0].words.startswith("the prediction is rounded here")
    assert verdict.tried == ("tlc", "rounding")


def test_a_flat_ssim_is_named(tmp_path: Path, weights: Path, gopro: Path) -> None:
    score = expected("gopro", gopro, tlc=True, rounds=True)
    run(tmp_path, "gopro", weights, score, images=4)
    flat = json.loads((tmp_path / "out" / "summary.json").read_text())["ssim_2d"]
    verdict = run(tmp_path, "gopro", weights, (score[0], flat), images=4)
    assert len(verdict.problems) == 1
    assert causes(verdict) == ["ssim-2d"]
    other = run(tmp_path, "gopro", weights, score, images=4, metrics="basicsr")
    assert causes(other) == ["ssim-2d", "protocol"]
    assert other.causes[1].words == "these scores follow gopro+basicsr: take gopro and metrics authors"


def test_the_other_blur_is_named(tmp_path: Path, weights: Path, gopro: Path) -> None:
    score = expected("gopro", gopro, tlc=True, rounds=True)
    verdict = run(tmp_path, "gopro", weights, score, images=4, variant="gamma")
    assert abs(verdict.psnr_off or 0) > 0.02
    assert causes(verdict) == ["blur_gamma"]


@pytest.mark.parametrize("kind", ["blur", "sharp"])
def test_one_missing_image_is_named(tmp_path: Path, weights: Path, gopro: Path, kind: str) -> None:
    (gopro / "test" / "GOPR0384_11_00" / kind / "000002.png").unlink()
    score = expected("gopro", gopro, tlc=True, rounds=True)
    verdict = run(tmp_path, "gopro", weights, score, images=4)
    assert causes(verdict) == ["count"]
    if kind == "blur":
        assert verdict.problems == ("3 images, the published mean is over 4",)
    else:
        assert verdict.problems == ("1 images were not restored: GOPR0384_11_00/blur/000002.png missing",)


def test_what_nothing_explains_is_said(tmp_path: Path, weights: Path, gopro: Path) -> None:
    score = expected("gopro", gopro, tlc=True, rounds=True)
    verdict = run(tmp_path, "gopro", weights, (score[0] + 7, score[1]), images=4)
    assert causes(verdict) == []
    assert verdict.tried == ("tlc", "rounding", "blur_gamma")
    assert "none of the usual ones explains it (tried on a sample: tlc, rounding" in "\n".join(benchmark.lines(verdict))
    quiet = run(tmp_path, "gopro", weights, (score[0] + 7, score[1]), images=4, explain=False)
    assert "cause      not looked for on a sample" in benchmark.lines(quiet)


def test_a_setting_that_could_not_be_tried_is_said(
    tmp_path: Path, weights: Path, gopro: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = flows._moved

    def broken(job: Any, trial: benchmark.Trial, *more: Any) -> float | None:
        if trial.name == "rounding":
            raise OSError("no space left")
        return moved(job, trial, *more)

    monkeypatch.setattr(flows, "_moved", broken)
    score = expected("gopro", gopro, tlc=True, rounds=True)
    verdict = run(tmp_path, "gopro", weights, (score[0] + 7, score[1]), images=4)
    assert verdict.tried == ("tlc", "blur_gamma")
    assert "           could not be tried: rounding: OSError: no space left" in benchmark.lines(verdict)


def test_tiles_and_precisions_are_rows_of_their_own(tmp_path: Path, weights: Path, gopro: Path) -> None:
    score = expected("gopro", gopro, tlc=True, rounds=True)
    verdict = run(tmp_path, "gopro", weights, score, images=4, tile=68, halo=8)
    assert verdict.kind == "tiled"
    assert verdict.tolerance == benchmark.Tolerance(0.05, 2e-3)


def test_tiles_that_change_the_result_are_named(tmp_path: Path, gopro: Path) -> None:
    """Without TLC each tile has a mean of its own."""
    strong = (3, 2000)
    weights = save_published(tmp_path / "strong.pth", network(*strong))
    score = expected("gopro", gopro, tlc=False, rounds=True, net=network(*strong))
    verdict = run(tmp_path, "gopro", weights, score, images=4, tlc=False, tile=64, halo=8)
    assert abs(verdict.psnr_off or 0) > 0.05
    assert "tiles" in causes(verdict)


def test_an_interrupted_run_ends_as_one_run(tmp_path: Path, weights: Path, gopro: Path, monkeypatch: Any) -> None:
    score = expected("gopro", gopro, tlc=True, rounds=True)
    whole = run(tmp_path, "gopro", weights, score, images=4)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    complete = engine.run

    def cut(parts: Any, work: Work, placement: Any, on_rows: Any, **more: Any) -> dict[str, Any]:
        complete([next(iter(parts)).slice(0, 3)], work, placement, on_rows, **more)
        raise KeyboardInterrupt

    (tmp_path / "out").rename(tmp_path / "first")
    with monkeypatch.context() as patch:
        patch.setattr(engine, "run", cut)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, "gopro", weights, score, images=4)
    again = run(tmp_path, "gopro", weights, score, images=4)
    assert again == whole
    after = json.loads((tmp_path / "out" / "summary.json").read_text())
    for name in ("counts", "psnr", "psnr_input", "ssim_3d", "ssim_2d", "gain", "worst", "best", "tiled"):
        assert after[name] == summary[name], name
    rows = [
        {row["key"]: row["digest"] for row in pq.read_table(tmp_path / place / "report").to_pylist()}
        for place in ("first", "out")
    ]
    assert rows[0] == rows[1]


def verdict_of(psnr: float, goal: float, **more: Any) -> benchmark.Verdict:
    known = {"data": "gopro", "checkpoint": "a|b", "kind": "float32, whole images", "images": 1111, "ssim_3d": 0.96}
    goal_ = benchmark.Published("row", goal, 0.9668, 1111)
    return benchmark.Verdict(
        **{
            **known,
            "published": goal_,
            "tolerance": benchmark.Tolerance(0.01, 5e-4),
            "psnr": psnr,
            "problems": (),
            **more,
        }
    )


def test_a_guessed_range_shows_in_the_numbers() -> None:
    summary = {"images": 1111, "counts": {"missing": 0, "restored": 1111}, "ssim_2d": 0.9, "scored": 1111}
    off = verdict_of(33.71, 33.71 + 50 * 20 * math.log10(255) / 1111)
    found = benchmark._read_off(summary, off)
    assert [cause.name for cause in found] == ["range"]
    assert "50 times 48.13 dB" in found[0].words
    one = verdict_of(33.71, 33.71 + 20 * math.log10(255) / 1111)
    assert [cause.name for cause in benchmark._read_off(summary, one)] == ["range"]
    assert benchmark._read_off(summary, verdict_of(30.71, 33.71)) == []  # 69.25 images


@pytest.mark.parametrize(
    ("ours", "goal", "cause", "words"),
    [
        (33.0812, 33.7103, "tlc", "33.08 dB is what this checkpoint gives without TLC"),
        (33.7103, 33.65, "tiles", "the value to meet, 33.65 dB, is what this checkpoint gives in patches"),
        (33.7246, 33.7103, "rounding", "33.7246 dB is what this checkpoint gives where predictions are not rounded"),
    ],
)
def test_numbers_that_others_got_are_known(ours: float, goal: float, cause: str, words: str) -> None:
    summary = {"images": 1111, "counts": {"missing": 0, "restored": 1111}, "ssim_2d": 0.9, "scored": 1111}
    (found,) = benchmark._read_off(summary, verdict_of(ours, goal, checkpoint="NAFNet-GoPro-width64"))
    assert found.name == cause
    assert found.words.startswith(words)


def test_published_values_of_rows() -> None:
    assert benchmark.default_checkpoint("gopro") == "NAFNet-GoPro-width64"
    assert benchmark.published("NAFNet-GoPro-width64", "gopro") == benchmark.Published(
        "NAFNet-GoPro-width64", 33.7103, 0.9668, 1111
    )
    assert benchmark.published("table5/relu", "sidd") == benchmark.Published("table5/relu", 39.98, None, 1280)
    with pytest.raises(ValueError, match="nothing is published of NAFNet-GoPro-width64 on sidd: give the value"):
        benchmark.published("NAFNet-GoPro-width64", "sidd")
    with pytest.raises(ValueError, match="nafnet info lists what is"):
        benchmark.published("/some/file.pth", "gopro")


def test_the_table_of_many_runs(tmp_path: Path) -> None:
    verdicts = [
        verdict_of(33.7103, 33.7103, ssim_3d=0.9668),
        verdict_of(33.08, 33.7103, problems=("PSNR",), causes=(benchmark.Cause("tlc", "TLC is off"),)),
    ]
    places = benchmark.write_table(Store(str(tmp_path)), verdicts)
    lines = Path(places["table"]).read_text().splitlines()
    assert len({len(line) for line in lines}) == 1  # columns line up
    cells = [
        "gopro",
        "a\\|b",
        "row",
        "float32, whole images",
        *["33.7103", "33.0800", "-0.6303", "0.9668", "0.9600", "-0.0068"],
    ]
    assert re.split(r"\s+\|\s+", lines[3].strip("| ")) == [*cells, "not reproduced"]
    rows = pq.read_table(places["rows"]).to_pylist()
    assert [row["reproduced"] for row in rows] == [True, False]
    assert rows[1]["cause"] == "TLC is off"
    assert Path(places["plot"]).read_text().count("</svg>") == 1


def test_the_command(tmp_path: Path, weights: Path, gopro: Path, command_environment: dict[str, str]) -> None:
    score = expected("gopro", gopro, tlc=True, rounds=True)

    words = ["benchmark", "gopro", "--data", gopro, "--checkpoint", weights, "--tlc", "--train-size", CROP]
    words += ["--images", 4, "--output", tmp_path / "out", "--expect", f"{score[0]:.4f},{score[1]:.4f}"]
    command = [str(Path(sys.executable).with_name("nafnet")), *map(str, words)]
    done = subprocess.run(command, env=command_environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "verdict    reproduced: the value given" in done.stdout
    assert re.search(r"PSNR +\d\d\.\d{4} +\d\d\.\d{4} +[+-]0\.000\d dB  \(tolerance 0\.01\)", done.stdout)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["benchmark"], "which test set?"),
        (["benchmark", "gopro"], "--data takes one URL with gopro"),
        (["benchmark", "gopro", "--data", "/nowhere"], "nothing at /nowhere"),
        (["benchmark", "--all", "--data", "x=/y"], "--all takes --data NAME=URL"),
        (["benchmark", "--all", "--data", "gopro=/y", "--expect", "30"], "against its own value: leave out --expect"),
        (["benchmark", "gopro", "--data", "SET", "--pair", "a=b"], "pair without a reference"),
        (["benchmark", "gopro", "--data", "SET", "--checkpoint", "{row}.pth"], "{row} takes one --checkpoint"),
        (["benchmark", "gopro", "--data", "SET", "--checkpoint", "demo"], "nothing is published of demo on gopro"),
        (["benchmark", "gopro", "--data", "SET", "--expect", "high"], "--expect takes PSNR or PSNR,SSIM"),
        (
            ["benchmark", "gopro", "--data", "SET", "--expect", "30", "--checkpoint", "demo", "--tile", "9"],
            "--tile: takes",
        ),
    ],
)
def test_mistakes_are_said_before_any_work(
    tmp_path: Path, gopro: Path, words: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, [str(gopro) if word == "SET" else word for word in words])
    assert result.exit_code == 2, result.output
    assert said in result.stderr
    assert not (tmp_path / "benchmark").exists()


def test_all_published_rows_end_as_one_table(tmp_path: Path, gopro: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows of a catalog of our own, found by name below NAFNET_WEIGHTS and held to their hashes."""
    goal = expected("gopro", gopro, tlc=True, rounds=True)
    rows = {}
    for name, psnr in (("Ours-GoPro", goal[0]), ("Other-GoPro", goal[0] + 1)):
        file = save_published(tmp_path / f"{name}.pth", network())
        sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
        rows[name] = catalog.CatalogEntry(
            name, file.name, network().config, True, "gopro", sha256, file.stat().st_size, psnr, goal[1], CROP
        )
    monkeypatch.setattr(catalog, "CATALOG", rows)
    monkeypatch.setenv("NAFNET_WEIGHTS", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    words = ["benchmark", "--all", "--data", f"gopro={gopro}", "--images", "4", "--train-size", str(CROP)]
    result = CliRunner().invoke(app, [*words, "--no-explain"])
    assert result.exit_code == 1, result.output
    table = (tmp_path / "benchmark" / "benchmark.md").read_text()
    assert table in result.stdout
    ours, other = (re.split(r"\s+\|\s+", line.strip("| ")) for line in table.splitlines()[2:])
    assert ours[:5] == ["gopro", "Ours-GoPro", "Ours-GoPro", "float32, whole images", f"{goal[0]:.4f}"]
    assert (ours[-1], other[-1]) == ("reproduced", "not reproduced")
    assert float(other[6]) == pytest.approx(-1, abs=1e-3)
    assert "not reproduced: gopro Other-GoPro" in result.stderr


def test_ablations_are_run_over_a_set_of_them(tmp_path: Path, gopro: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("table5/relu", "table5/gelu"):
        (tmp_path / "runs" / name).parent.mkdir(parents=True, exist_ok=True)
        net = reference.randomize(ablations.build(name, "gopro"))
        with torch.no_grad():
            net.ending.weight.mul_(0.02)
            net.ending.bias.zero_()
        checkpoint.save(tmp_path / "runs" / f"{name}.safetensors", net, {})
    words = ["benchmark", "gopro", "--data", str(gopro), "--images", "4", "--no-explain", "--against", "table5/*elu"]
    result = CliRunner().invoke(app, [*words, "--checkpoint", "runs/{row}.safetensors"])
    assert result.exit_code == 1, result.output
    table = (tmp_path / "benchmark" / "benchmark.md").read_text()
    rows = [re.split(r"\s+\|\s+", line.strip("| ")) for line in table.splitlines()[2:]]
    assert [(row[2], row[4]) for row in rows] == [("table5/relu", "32.5900"), ("table5/gelu", "32.7200")]
    assert rows[0][5] != rows[1][5]  # two networks
    assert (tmp_path / "benchmark" / "gopro-table5-relu" / "report.html").exists()


def test_a_file_that_is_not_the_rows_network_is_refused(
    tmp_path: Path, gopro: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_published(tmp_path / "relu.pth", ablations.build("table5/relu", "gopro"))
    words = ["benchmark", "gopro", "--data", str(gopro), "--checkpoint", "relu.pth", "--against", "table5/relu"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2, result.output
    assert "relu.pth is not the network of table5/relu: sigma is identity, the row's relu" in result.stderr
    assert not (tmp_path / "benchmark").exists()


def test_the_command_ends_red(tmp_path: Path, weights: Path, gopro: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["benchmark", "gopro", "--data", str(gopro), "--expect", "40", "--images", "4", "--no-explain"]
    words += ["--train-size", str(CROP), "--checkpoint", str(weights), "--checkpoint", "demo"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 1, result.output
    assert result.stdout.count("verdict    NOT reproduced: the value given") == 2
    assert "not reproduced: gopro" in result.stderr
    table = (tmp_path / "benchmark" / "benchmark.md").read_text()
    assert "| demo " in table
    assert table in result.stdout
    assert (tmp_path / "benchmark" / "gopro-demo" / "report.html").exists()


def test_runs_of_another_kind_leave_the_published_kinds_where_it_is(
    tmp_path: Path, gopro: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["benchmark", "gopro", "--data", str(gopro), "--expect", "40", "--no-explain", "--checkpoint", "demo"]
    assert CliRunner().invoke(app, [*words, "--tile", "auto"]).exit_code == 1
    assert [path.name for path in (tmp_path / "benchmark").iterdir()] == ["gopro-demo-auto"]
