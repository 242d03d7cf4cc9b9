"""The command as a person types it."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from typer.testing import CliRunner

from nafnet.images import Picture, encode, read_note
from nafnet.memory import process_bytes
from nafnet.model import NetConfig, Network, multiply_adds, parameters
from nafnet.restore import Restorer
from pipelines.cli import app, parameters_text

NAFNET = Path(sys.executable).with_name("nafnet")


@pytest.fixture
def prefect_home(tmp_path: Path) -> dict[str, str]:
    """An environment where Prefect starts a server for the command, its database away from the user's."""
    return {**os.environ, "PREFECT_HOME": str(tmp_path / "prefect"), "NO_COLOR": "1", "COLUMNS": "100"}


def nafnet(*words: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [str(NAFNET), *map(str, words)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)


def invoke(*words: object, env: dict[str, str] | None = None) -> Result:
    """The same in this process, without the seconds that a new one takes to start."""
    return CliRunner().invoke(app, [str(word) for word in words], env=env)


def write(folder: Path, name: str, pixels: np.ndarray) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(encode(Picture(pixels, "PNG")))


def test_restore_prints_what_came_of_it_and_nothing_else(
    tmp_path: Path,
    prefect_home: dict[str, str],
    command_environment: dict[str, str],
    checkpoint_file: Path,
    rng: np.random.Generator,
) -> None:
    for i in range(3):
        pixels = rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)
        write(tmp_path / "in", f"{i}.png", pixels)
        write(tmp_path / "ref", f"{i}.png", 255 - pixels)
    (tmp_path / "in" / "bad.png").write_bytes(b"no picture")
    (tmp_path / "ref" / "bad.png").write_bytes(b"no picture")
    words = ["restore", tmp_path / "in", tmp_path / "out", "--reference", tmp_path / "ref"]
    done = nafnet(*words, "--checkpoint", checkpoint_file, "--no-tlc", env=prefect_home)
    assert done.returncode == 1, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "4 images: 3 restored, 1 unreadable"
    assert re.fullmatch(r"mean PSNR  \d+\.\d\d dB before, \d+\.\d\d dB after \([+-]\d+\.\d\d dB\)", lines[1])
    assert re.fullmatch(r"SSIM-3D    -?0\.\d{4} before, -?0\.\d{4} after \([+-]\d\.\d{4}\)", lines[2])
    assert lines[3] == "scores     stored: the NAFNet authors' PSNR and SSIM-3D, prediction rounded"
    assert lines[4:] == [f"images     {tmp_path}/out/images", f"report     {tmp_path}/out/report.html"]
    said = done.stderr.splitlines()
    assert said[0] == "4 images match: 4 to restore, 0 finished in an earlier run, 0 that cannot be"
    assert re.fullmatch(r"4 of 4 images, \d+\.\d\d images/s, 0 s left, 1 not restored", said[-2])
    assert said[-1].startswith("nafnet: 4 images: 3 restored, 1 unreadable (tolerated: 0 not restored)")
    assert len(said) <= 5  # no chatter of Ray's or Prefect's

    words += ["--checkpoint", checkpoint_file, "--no-tlc", "--metrics", "basicsr", "--crop-border", "4", "--y-channel"]
    done = nafnet(*words, env=command_environment)
    assert "4 images match: 4 to restore, 0 finished" in done.stderr  # scored anew under another convention
    lines = done.stdout.splitlines()
    assert lines[2].startswith("SSIM-2D    ")
    assert lines[3].startswith("scores     stored+basicsr+y+crop4: BasicSR's PSNR and SSIM-2D of the Y channel")


def test_restore_writes_the_format_that_was_asked_for(
    tmp_path: Path, command_environment: dict[str, str], checkpoint_file: Path, rng: np.random.Generator
) -> None:
    pictures = {name: rng.integers(112, 144, (40, 60, 3), dtype=np.uint8) for name in ("a", "b")}
    for name, pixels in pictures.items():
        write(tmp_path / "in", f"{name}.png", pixels)
    options = ["--format", "jpeg", "--quality", "90", "--subsampling", "4:2:0"]
    options += ["--checkpoint", checkpoint_file, "--checkpoint", "demo", "--tile", "whole", "--deterministic"]
    done = nafnet("restore", tmp_path / "in", tmp_path / "out", *options, env=command_environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "2 images: 2 restored"
    restorer = Restorer.load(checkpoint_file, "demo", tile="whole", deterministic=True)
    for name, pixels in pictures.items():
        written = (tmp_path / "out" / "images" / f"{name}.jpg").read_bytes()
        restored = Picture(restorer(pixels), "JPEG")
        assert written == encode(restored, quality=90, subsampling="4:2:0", note=read_note(written))


def test_help_says_what_each_option_does() -> None:
    done = invoke("restore", "--help", env={"COLUMNS": "200", "NO_COLOR": "1"})
    said = " ".join(re.sub("[│╭╮╰╯─]", " ", done.stdout).split())
    for option, words in {
        "--checkpoint": "may repeat: one network then restores what the one before it made",
        "--tile": "whole images where they fit into memory, else the largest tile that does",
        "--strength": "Share of the restored image in the result, the rest is the input",
        "--self-ensemble": "The mean over eight flips and rotations, in eight times as long",
        "--guard": "Write the input for an implausible result, and mark it suspect",
        "--deterministic": "The same bits on every run and with any number of actors",
        "--format": "File format to write",
        "--quality": "with --format jpeg (default 95) or webp (default lossless)",
        "--subsampling": "Of a jpeg's colours",
    }.items():
        assert re.search(rf"{option} .*{re.escape(words)}", said), option


def test_dry_run_writes_nothing(tmp_path: Path, checkpoint_file: Path) -> None:
    for i in range(20):
        write(tmp_path / "in", f"{i}.png", np.zeros((100, 200, 3), np.uint8))
    words = ["restore", tmp_path / "in", tmp_path / "out", "--dry-run", "--metrics", "mmagic", "--checkpoint"]
    env = {"NAFNET_CACHE": str(tmp_path / "cache")}
    tiled = invoke(*words, f"file://{checkpoint_file}", "--no-tlc", "--tile", "176", "--halo", "64", env=env)
    assert "largest 200x100, 2 tiles of 176 px)" in tiled.stdout, tiled.stderr
    done = nafnet(*words, checkpoint_file)
    assert done.returncode == 0, done.stderr
    assert "20 match: 20 to restore, 0 finished, 0 that cannot be" in done.stdout
    assert ", protocol stored+mmagic\n" in done.stdout
    assert "megapixels about 0.4 (from 10 images; largest 200x100, no tiles)" in done.stdout
    assert re.search(r"memory     about \d+\.\d GiB an actor", done.stdout)
    assert re.search(r"time       about \d+ s", done.stdout)
    assert not (tmp_path / "out").exists()
    crowded = invoke(*words, checkpoint_file, "--actors", "1000")
    assert crowded.exit_code == 2
    assert "1000 actors asked for, the cluster has" in crowded.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["restore", "/nowhere", "/b", "--checkpoint", "demo", "--checkpoint", "nosuch"], "no checkpoint at .*nosuch"),
        (
            ["restore", "/nowhere", "/elsewhere", "--tile", "40"],
            "a tile of 40 px with a halo of 192 px keeps nothing: take 432 px or more",
        ),
        (
            ["restore", "/a", "/b", "--tile", "big", "--strength", "0"],
            "--tile: takes auto, whole, or a side of 32 px or more, got 'big'\n.*--strength: .*greater than 0",
        ),
        (["restore", "/a", "/b", "--guard", "maybe"], "'--guard': .*'maybe' is not one of 'on', 'off'"),
        (
            ["restore", "/a", "/b", "--deterministic", "--quality", "90"],
            "deterministic needs a tile .*; quality and subsampling need a format",
        ),
        (["restore", "/a", "/a/b"], "output /a/b lies inside source /a"),
        (["restore", "/a", "/b", "--actors", "0", "--halo", "-1"], "--halo: .*\n.*--actors: "),
        (
            ["restore", "/a", "/b", "--crop-border", "4", "--y-channel"],
            "--crop-border: not with .*\n.*--y-channel: not",
        ),
        (["score", "/a", "/b", "--crop-border", "4", "--y-channel"], "crop_border: not with .* y_channel: not with"),
        (["train", "x.safetensors", "--enc-blocks", "a,b"], "--enc-blocks takes numbers"),
        (["train", "x.safetensors", "--crop", "50"], "crop_px must be a multiple of 16"),
        (["train", "x.pth"], "must end in .safetensors"),
        (["info", __file__], "not a whole PyTorch file"),
        (["score", "/nowhere", "/nowhere"], "nothing at /nowhere"),
    ],
)
def test_mistakes_are_said_in_a_line_before_any_work(words: list[str], said: str) -> None:
    done = invoke(*words)
    assert done.exit_code == 2, done.output
    assert re.search(said, done.stderr), done.stderr
    assert "Traceback" not in done.stderr


def test_info_tells_what_a_file_holds(checkpoint_file: Path) -> None:
    done = nafnet("info", checkpoint_file)
    assert "NAFNet, width 8" in done.stdout
    assert "encoder (1, 1, 1, 4), middle 1, decoder (1, 1, 1, 1)" in done.stdout
    assert "TLC windows 384, 192, 96, 48, 24 px by level" in done.stdout
    assert "catalog     not in the catalog" in done.stdout


def test_info_shows_how_far_a_file_that_it_fetches_has_come(tmp_path: Path, checkpoint_file: Path) -> None:
    done = nafnet("info", f"file://{checkpoint_file}", env={**os.environ, "NAFNET_CACHE": str(tmp_path)})
    assert "NAFNet, width 8" in done.stdout
    assert f"fetching {checkpoint_file} (" in done.stderr


def info(*words: str) -> str:
    """What `nafnet info` prints, in this process: it loads nothing that could be in the way."""
    done = CliRunner().invoke(app, ["info", *words])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_info_alone_lists_the_catalog_and_the_ablations() -> None:
    lines = info().splitlines()
    assert "NAFNet-GoPro-width64      33.7103   0.9668  on   gopro" in lines
    assert "table1/plainnet              36     14.77 M   15.82  39.29  28.51" in lines
    assert "table3/72-blocks             72     33.93 M   30.62  39.95  32.88" in lines
    assert lines[-1].startswith("GMACs at 256x256; PSNR in dB")
    table = info("table2", "--data", "sidd", "--size", "256x250").splitlines()  # padded to 256x256
    assert table[0].startswith("ablation, sidd layout ")
    assert table[1:5] == [
        "table2/baseline              36     29.06 M   15.87  39.85  32.35",
        "table2/baseline+sg           36     29.16 M   16.05  39.93  32.76",
        "table2/baseline+sca          36     29.05 M   15.87  39.95  32.54",
        "table2/nafnet                36     29.16 M   16.05  39.96  32.85",
    ]


def test_info_of_an_ablation() -> None:
    said = info("table1/plainnet")
    assert said.startswith("table1/plainnet: 36 blocks in the gopro layout\n  network     PlainNet, width 32\n")
    assert "  TLC windows none, there is no attention\n" in said
    assert "  published   39.29 dB on SIDD, 28.51 dB on GoPro (Table 1, learning rate 0.0001)\n" in said
    assert "layout " not in said.partition("\n")[2]
    said = info("table3/18-blocks", "--data", "sidd", "--train-size", "128")
    assert "  blocks      encoder (1, 1, 2, 4), middle 6, decoder (1, 1, 1, 1)\n" in said
    assert "  TLC windows 192, 96, 48, 24, 12 px by level (trained on 128 px crops)\n" in said
    assert "  layout      chosen here: the paper prints the number of blocks alone\n" in said
    assert "  latency     151.7 ms at 1280x720 as published\n" in said
    assert "(sigma silu)" in info("table5/silu")


@pytest.mark.parametrize(
    ("name", "parameters", "gmacs", "published"),
    [
        ("NAFNet-SIDD-width64", "115,982,915", "63.24", "40.3045 dB, SSIM-3D 0.9614 (sidd, without TLC)"),
        ("Baseline-GoPro-width64", "112,036,291", "82.41", "33.3960 dB, SSIM-3D 0.9649 (gopro, with TLC)"),
    ],
)
def test_info_of_a_published_file_that_is_not_here(
    name: str, parameters: str, gmacs: str, published: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NAFNET_CACHE", str(tmp_path))
    said = info(name)
    assert f"  file        not at {tmp_path}/{name}.pth\n" in said
    assert f"  parameters  {parameters}\n  arithmetic  {gmacs} G multiply-adds at 256x256\n" in said
    assert f"  published   {published}\n" in said
    assert not list(tmp_path.iterdir())


def test_info_of_any_network_that_train_could_make() -> None:
    said = info("--activation", "gelu", "--attention", "ca", "--dw-expand", "1")
    assert "  network     Baseline, width 32\n" in said
    assert "  parameters  17,023,875\n  arithmetic  15.82 G multiply-adds at 256x256\n" in said
    shape = ["--width", "4", "--enc-blocks", "1,2", "--dec-blocks", "2,1", "--gate-sigma", "relu", "--norm", "none"]
    said = info(*shape, "--size", "270x190")
    config = NetConfig(width=4, enc_blocks=(1, 2), dec_blocks=(2, 1), sigma="relu", norm="none")
    assert f"  network     {parameters_text(config).partition(' of ')[0]}, width 4\n" in said
    assert "  blocks      encoder (1, 2), middle 1, decoder (2, 1)\n" in said
    assert f"  parameters  {parameters(Network(config)):,}\n" in said
    assert f"  arithmetic  {multiply_adds(config, 190, 270) / 1e9:.2f} G multiply-adds at 270x190\n" in said
    for where, device in (("on a CPU", "cpu"), ("on a GPU", "cuda")):
        full = process_bytes([config], 190, 270, device=device) / 2**20
        half = process_bytes([config], 190, 270, device=device, precision="bf16") / 2**20
        assert f"{where} about {full:,.0f} MiB in float32, {half:,.0f} MiB in bf16" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "demo --width 4 --gate-sigma relu --data sidd --size 3x --train-size 0",
            [
                "nafnet: --size takes WIDTHxHEIGHT in px, such as 1280x720; got '3x'",
                "--train-size is a number of px, got 0",
                "demo has a shape of its own: leave out --width, --gate-sigma, or the name",
                "--data lays out the blocks of an ablation: take --enc-blocks and its kin, or leave it out",
            ],
        ),
        (
            "--enc-blocks x --dec-blocks 1,y --size 0x5",
            [
                "nafnet: --size takes WIDTHxHEIGHT in px, such as 1280x720; got '0x5'",
                "--enc-blocks takes numbers with commas between, such as 1,1,1,28; got 'x'",
                "--dec-blocks takes numbers with commas between, such as 1,1,1,28; got '1,y'",
            ],
        ),
        (
            "--activation relu --gate-sigma silu",
            ["nafnet: sigma='silu' acts inside the gate, but activation is 'relu'"],
        ),
        ("table3 --train-size 96", ["nafnet: --train-size needs one network, and this is a list: leave it out"]),
        ("table1/baseline --train-size 9", ["nafnet: train_size 9 is too small for a network of 4 levels"]),
        (
            "sigmoyd --width 8",
            [
                f"nafnet: no file at {Path('sigmoyd').absolute()}, and no catalog entry or ablation of that name: "
                "near it are table5/sigmoid",
                "sigmoyd has a shape of its own: leave out --width, or the name",
            ],
        ),
    ],
)
def test_info_says_all_mistakes_at_once(words: str, said: list[str]) -> None:
    done = CliRunner().invoke(app, ["info", *words.split()])
    assert done.exit_code == 2
    assert done.stdout == ""
    assert [line.strip() for line in done.stderr.splitlines()] == said


def test_score_compares_two_folders(tmp_path: Path) -> None:
    for i, offset in enumerate((0, 1, 2)):
        write(tmp_path / "a", f"{i}.png", np.full((16, 16, 3), 100, np.uint8))
        write(tmp_path / "b", f"{i}.png", np.full((16, 16, 3), 100 + offset, np.uint8))
    write(tmp_path / "a", "alone.png", np.zeros((16, 16, 3), np.uint8))
    (tmp_path / "a" / "notes.txt").write_text("not an image, not scored")
    done = nafnet("score", tmp_path / "a", tmp_path / "b")
    assert done.returncode == 1
    assert "alone.png: no reference of that name" in done.stdout
    assert "1 images equal their reference: not in the mean PSNR" in done.stdout
    assert " 48.1308 " in done.stdout
    assert re.search(r"^ 45\.1205 .* mean of 3 under protocol stored$", done.stdout, re.MULTILINE)
    assert done.stdout.startswith("    PSNR  SSIM-3D  SSIM-2D  image\n")
    assert "\nscores are the NAFNet authors' PSNR and SSIM-3D, prediction rounded\n" in done.stdout
    done = nafnet("score", tmp_path / "a", tmp_path / "b", "--metrics", "basicsr", "--y-channel", "--crop-border", "2")
    assert done.stdout.startswith("    PSNR  SSIM-2D  image\n")
    luma = 20 * math.log10(255 / (219 / 255))  # one grey level is 219/255 of luma
    assert re.search(rf"^ {luma:.4f}   1\.0000  1\.png$", done.stdout, re.MULTILINE)
    assert " mean of 3 under protocol stored+basicsr+y+crop2\nscores are BasicSR's PSNR" in done.stdout
    assert "1 images equal their reference: not in the mean PSNR" in done.stdout


def test_train_makes_a_checkpoint_that_info_reads(tmp_path: Path) -> None:
    shape = ["--width", "4", "--enc-blocks", "1", "--middle-blocks", "0", "--dec-blocks", "1"]
    small = ["--steps", "4", "--batch", "1", "--crop", "32", "--scenes", "2"]
    done = nafnet("train", tmp_path / "net.safetensors", *shape, *small)
    assert done.returncode == 0, done.stderr
    assert re.search(r"step 4/4: \d+\.\d\d dB, held-out \d+\.\d\d dB, 0 min left", done.stdout)
    assert "trained on 32 px crops" in nafnet("info", tmp_path / "net.safetensors").stdout


def test_the_model_library_works_without_the_batch_system(tmp_path: Path) -> None:
    """As after `pip install nafnet-pipelines` alone: the packages of the extra cannot be imported."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name in {'ray', 'prefect', 'pyarrow', 'fsspec', 's3fs', 'jinja2', 'skimage'}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
    )
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    code = "import numpy as np, nafnet; print(nafnet.Restorer.load('demo')(np.zeros((8, 9, 3), np.uint8)).shape)"
    used = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert used.stdout.strip() == "(8, 9, 3)", used.stderr
    assert "width 16" in nafnet("info", "demo", env=env).stdout
    refused = nafnet("restore", tmp_path / "in", tmp_path / "out", env=env)
    assert refused.returncode != 0
    assert "pip install 'nafnet-pipelines[pipelines]'" in refused.stderr
