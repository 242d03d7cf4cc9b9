"""A real training of a few seconds: it learns, it can be interrupted, and it writes what it says."""

import functools
import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from PIL import Image

from nafnet import checkpoint
from nafnet import train as training
from nafnet.model import NetConfig
from nafnet.train import TrainRecipe, batch, psnr_loss, train

RECIPE = TrainRecipe(
    network=NetConfig(width=8, enc_blocks=(1,), middle_blocks=1, dec_blocks=(1,)),
    steps=12,
    batch=2,
    crop_px=32,
    scenes=3,
    scene_px=64,
)


class PowerCutError(Exception):
    """Raised in the middle of a training."""


@pytest.fixture(scope="module", autouse=True)
def scenes_drawn_once():
    """Starting the processes that draw takes longer than the training: those of one recipe are kept for the next."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "_draw", functools.cache(training._draw))
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A whole training: the file it wrote and the progress it reported."""
    seen = []
    out = train(RECIPE, tmp_path_factory.mktemp("train") / "deep" / "net.safetensors", **reports(seen.append))
    return out, seen


def reports(report):
    return {"report": report, "report_every": 2, "save_every": 4}


def test_the_loss_falls(trained):
    _, seen = trained
    assert [progress.step for progress in seen] == [2, 4, 6, 8, 10, 12]
    assert {progress.steps for progress in seen} == {12}
    assert seen[-1].loss < seen[0].loss - 1  # dB
    assert all(progress.psnr == -progress.loss for progress in seen)
    validated = [(progress.step, progress.validation_psnr) for progress in seen if progress.validation_psnr is not None]
    assert [step for step, _ in validated] == [4, 8, 12]
    assert validated[-1][1] > validated[0][1]
    assert seen[-1].seconds_left == 0
    assert 0 < seen[0].seconds < seen[-1].seconds


def test_what_it_leaves_behind(trained):
    out, seen = trained
    assert sorted(file.name for file in out.parent.iterdir()) == [
        "net.history.jsonl",
        "net.png",
        "net.safetensors",
    ]
    loaded = checkpoint.load(out)
    assert loaded.network.config == RECIPE.network
    assert loaded.train_size == 32
    assert json.loads(loaded.metadata["recipe"]) == json.loads(json.dumps(asdict(RECIPE)))
    assert loaded.network.encoders[0][0].beta.abs().max() > 0  # skip-init: zero before it learned
    rows = [json.loads(line) for line in out.with_suffix(".history.jsonl").read_text().splitlines()]
    assert rows == [asdict(progress) for progress in seen]
    with Image.open(out.with_suffix(".png")) as curves:
        assert curves.size == (990, 440)
        assert len(curves.convert("L").getcolors()) > 10


def test_an_interrupted_training_goes_on_exactly(trained, tmp_path):
    whole, seen = trained
    out = tmp_path / "net.safetensors"

    def cut(progress):
        if progress.step == 6:
            raise PowerCutError

    with pytest.raises(PowerCutError):
        train(RECIPE, out, **reports(cut))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["net.state"]

    with pytest.raises(ValueError, match=r"net\.state is of another recipe: delete it to start anew"):
        train(replace(RECIPE, seed=1), out)

    resumed = []
    train(RECIPE, out, **reports(resumed.append))
    assert [progress.step for progress in resumed] == [6, 8, 10, 12]
    weights, expected = (checkpoint.load(path).network.state_dict() for path in (out, whole))
    for name, tensor in expected.items():  # to the last bit where this was measured
        torch.testing.assert_close(weights[name], tensor, atol=1e-6, rtol=1e-5, msg=name)
    rows = [json.loads(line) for line in out.with_suffix(".history.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6, 8, 10, 12]
    for row, progress in zip(rows, seen, strict=True):
        assert row["loss"] == pytest.approx(progress.loss, abs=1e-3)
    assert not out.with_suffix(".state").exists()


def test_psnr_loss_by_hand():
    clean = torch.full((2, 3, 4, 4), 0.5)
    restored = clean + torch.tensor([0.1, 0.001]).reshape(2, 1, 1, 1)  # 20 dB and 60 dB
    expected = 10 * (math.log10(0.01 + 1e-8) + math.log10(1e-6 + 1e-8)) / 2
    assert float(psnr_loss(restored, clean)) == pytest.approx(expected, abs=1e-3)
    assert expected == pytest.approx(-40, abs=0.1)
    assert float(psnr_loss(clean, clean)) == pytest.approx(-80, abs=1e-4)  # 1e-8 keeps it finite


def test_a_batch_is_a_function_of_seed_and_step():
    pool = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)
    degraded, clean = batch(pool, RECIPE, 5)
    assert degraded.shape == clean.shape == (2, 3, 32, 32)
    assert degraded.is_contiguous(memory_format=torch.channels_last)
    for again, first in zip(batch(pool, RECIPE, 5), (degraded, clean), strict=True):
        assert torch.equal(again, first)
    assert not torch.equal(batch(pool, RECIPE, 6)[1], clean)
    assert not torch.equal(batch(pool, replace(RECIPE, seed=1), 5)[1], clean)


def test_crops_come_from_the_scenes_turned_and_mirrored():
    pool = np.random.default_rng(0).integers(0, 256, (2, 33, 33, 3), np.uint8)
    recipe = replace(RECIPE, batch=40, scene_px=33)
    _, clean = batch(pool, recipe, 0)
    places = {}
    for scene, picture in enumerate(pool):
        for top in (0, 1):
            for left in (0, 1):
                for turns in range(4):
                    for mirror in (False, True):
                        crop = np.rot90(picture[top : top + 32, left : left + 32], turns)
                        crop = np.ascontiguousarray(crop[:, ::-1] if mirror else crop)
                        places[crop.tobytes()] = (scene, top, left, turns, mirror)
    found = [places[np.rint(crop.permute(1, 2, 0).numpy() * 255).astype(np.uint8).tobytes()] for crop in clean]
    for which in range(5):
        assert {place[which] for place in found} == {place[which] for place in places.values()}


def test_noise_is_of_the_strengths_asked_for_and_stored_as_a_picture_is():
    pool = np.full((1, 64, 64, 3), 128, np.uint8)
    recipe = replace(RECIPE, batch=60, sigma=(5.0, 20.0))
    degraded, clean = batch(pool, recipe, 0)
    strengths = (degraded - clean).std(dim=(1, 2, 3)) * 255
    assert 4.7 < strengths.min() < 7
    assert 18 < strengths.max() < 20.6
    dark, _ = batch(pool * 0, replace(recipe, sigma=(50.0, 50.0)), 0)
    assert dark.min() == 0  # clipped
    assert (dark == 0).float().mean() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"crop_px": 33}, ["crop_px must be a multiple of 2 and at most 64"]),
        ({"crop_px": 66}, ["crop_px must be a multiple of 2 and at most 64"]),
        ({"crop_px": 0}, ["crop_px"]),
        ({"sigma": (50.0, 5.0)}, ["sigma must go from low to high, got (50.0, 5.0)"]),
        ({"sigma": (-1.0, 5.0)}, ["sigma"]),
        ({"steps": 0}, ["steps, batch and scenes must be at least 1"]),
        ({"precision": "fp8"}, ["precision is float32 or bf16, got 'fp8'"]),
        (
            {"crop_px": 33, "sigma": (2.0, 1.0), "batch": 0, "precision": "float16"},
            ["crop_px must", "sigma must", "batch and scenes must", "precision is"],
        ),
    ],
)
def test_bad_recipes_list_all_their_problems(fields, words):
    with pytest.raises(ValueError, match=r"must|precision") as caught:
        replace(RECIPE, **fields)
    assert str(caught.value).count("; ") == len(words) - 1
    assert all(word in str(caught.value) for word in words)
