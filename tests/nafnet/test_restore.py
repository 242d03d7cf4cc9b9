"""The contract of one image in, one image out, for every kind of image and recipe."""

import hashlib
import math
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Barrier, Event, Thread

import numpy as np
import pytest
import torch

from nafnet import catalog, checkpoint, metrics, restore
from nafnet.checkpoint import CheckpointError
from nafnet.degrade import gaussian_noise, scene
from nafnet.memory import LADDER
from nafnet.model import NetConfig, Network
from nafnet.recipe import Recipe, Step
from nafnet.restore import Restorer, to_float
from nafnet.strips import StripNetwork
from pipelines.demo import photographs
from tests.nafnet import reference

SMALL = NetConfig(width=8, enc_blocks=(1, 1), middle_blocks=1, dec_blocks=(1, 1))
SHAPES = [(19, 26), (19, 26, 1), (19, 26, 2), (19, 26, 3), (19, 26, 4)]
KINDS = ["uint8", "uint16", "float32"]
GLOBAL = Recipe((Step("w", tlc=False),), tile="whole")
RECIPE = Recipe((Step("a" * 64, train_size=32),), tile="whole", guard=False)


def network_of(config=SMALL):
    """Random, but what it adds is mild enough that few values are clipped."""
    network = reference.randomize(Network(config))
    with torch.no_grad():
        network.ending.weight *= 0.2
        network.ending.bias *= 0.2
    return network


def restorer_of(recipe=RECIPE, config=SMALL):
    return Restorer([network_of(config)], recipe)


def image_of(shape, kind, seed=0):
    rng = np.random.default_rng(seed)
    if kind == "float32":
        return rng.random(shape, np.float32)
    return rng.integers(0, np.iinfo(kind).max, shape, kind, endpoint=True)


def expected(image, train_size=32):
    """What the reference network makes of the colours of an image (H, W, C), as float32 not yet stored."""
    top = 1 if image.dtype == np.float32 else np.iinfo(image.dtype).max
    colour = torch.from_numpy(image.astype(np.float32) / np.float32(top)).permute(2, 0, 1)[None].expand(1, 3, -1, -1)
    with torch.no_grad():
        return reference.network(network_of().state_dict(), colour, train_size=train_size)[0].permute(1, 2, 0).numpy()


def mild_scene(seed, size_px):
    """A scene as float32 in [0.3, 0.7], so that clipping hides no difference."""
    return 0.3 + scene(seed, size_px).astype(np.float32) * np.float32(0.4 / 255)


def agreement(a, b):
    """In dB of full range, of float images."""
    mse = np.square(a.astype(np.float64) - b).mean()
    return math.inf if mse == 0 else -10 * math.log10(mse)


# One image


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_kind_of_image(shape, kind):
    image = image_of(shape, kind)
    before = image.copy()
    restored = restorer_of()(image)
    assert restored.shape == shape
    assert restored.dtype == kind
    np.testing.assert_array_equal(image, before)
    assert not np.shares_memory(restored, image)

    pixels, out = image.reshape(19, 26, -1), restored.reshape(19, 26, -1)
    colours = {1: 1, 2: 1, 3: 3, 4: 3}[pixels.shape[-1]]
    values = expected(pixels[..., :colours])
    if colours == 1:
        values = values.mean(-1, keepdims=True)
    values = values.clip(0, 1)
    if kind == "float32":
        np.testing.assert_allclose(out[..., :colours], values, atol=1e-5)
    else:
        full = np.iinfo(kind).max
        np.testing.assert_allclose(out[..., :colours], values * full, atol=0.5 + 1e-5 * full)
    np.testing.assert_array_equal(out[..., colours:], pixels[..., colours:])  # alpha
    assert np.abs(out[..., :colours] - pixels[..., :colours].astype(float)).max() > 0.1 * to_range(kind)


def to_range(kind):
    return 1 if kind == "float32" else np.iinfo(kind).max


def test_grey_is_the_mean_of_three_equal_channels():
    restorer = restorer_of()
    grey = image_of((12, 15), "float32")
    values = expected(grey[..., None]).mean(-1)
    np.testing.assert_allclose(restorer(grey), values.clip(0, 1), atol=1e-5)
    np.testing.assert_array_equal(restorer(grey[..., None])[..., 0], restorer(grey))


def test_alpha_changes_nothing():
    restorer = restorer_of()
    rgba = image_of((12, 15, 4), "uint8")
    np.testing.assert_array_equal(restorer(rgba)[..., :3], restorer(rgba[..., :3]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_network_that_adds_nothing_returns_every_value(kind):
    network = network_of()
    torch.nn.init.zeros_(network.ending.weight)
    torch.nn.init.zeros_(network.ending.bias)
    every = np.arange(65536 if kind == "uint16" else 256).reshape(-1, 256)
    image = every.astype(kind) if kind != "float32" else (every / 255).astype(np.float32)
    for precision in ("float32", "bf16"):
        restorer = Restorer([network], replace(RECIPE, precision=precision))
        if kind == "float32":
            np.testing.assert_allclose(restorer(image), image, atol=1e-7)
        else:
            np.testing.assert_array_equal(restorer(image), image)


def test_results_are_clipped_and_rounded():
    network = network_of()
    torch.nn.init.zeros_(network.ending.weight)
    image = np.array([[0, 10, 11, 250, 255]], np.uint8)
    for bias, result in [(0.4, [0, 10, 11, 250, 255]), (19.6, [20, 30, 31, 255, 255]), (-10.4, [0, 0, 1, 240, 245])]:
        torch.nn.init.constant_(network.ending.bias, bias / 255)
        assert Restorer([network], RECIPE)(image).tolist() == [result]


@pytest.mark.parametrize("kind", KINDS)
def test_read_only_and_strided_images(kind, recwarn):
    restorer = restorer_of()
    image = image_of((20, 24, 3), kind)
    locked = image.copy()
    locked.setflags(write=False)
    np.testing.assert_array_equal(restorer(locked), restorer(image))
    mirrored = image[::-1, ::-2]
    np.testing.assert_array_equal(restorer(mirrored), restorer(mirrored.copy()))
    assert not recwarn.list


def test_a_restorer_does_not_change_with_use():
    restorer = restorer_of()
    first, other = image_of((30, 22, 3), "uint8"), image_of((9, 80), "uint16", seed=1)
    alone = restorer(first)
    restorer(other)
    np.testing.assert_array_equal(restorer(first), alone)


def test_grey_networks_take_grey():
    restorer = restorer_of(config=replace(SMALL, image_channels=1))
    assert restorer(image_of((9, 11), "uint8")).shape == (9, 11)
    with pytest.raises(ValueError, match="the network takes 1 channels, the image has 3"):
        restorer(image_of((9, 11, 3), "uint8"))


BAD_IMAGES = {
    "above one": (np.full((4, 4, 3), 1.0001, np.float32), r"float images must lie in \[0, 1\], got \[1.0001, 1.0001\]"),
    "below zero": (np.full((4, 4), -1e-3, np.float32), r"must lie in \[0, 1\]"),
    "8-bit range": (np.full((4, 4), 200, np.float32), "divide by their range first"),
    "NaN": (np.array([[0.5, np.nan]], np.float32), r"must lie in \[0, 1\], got \[nan, nan\]"),
    "infinite": (np.array([[0.5, np.inf]], np.float32), r"must lie in \[0, 1\]"),
    "double": (np.zeros((4, 4)), "must be uint8, uint16 or float32, got float64"),
    "signed": (np.zeros((4, 4), np.int16), "got int16"),
    "boolean": (np.zeros((4, 4), bool), "got bool"),
    "half": (np.zeros((4, 4), np.float16), "got float16"),
    "big-endian": (np.zeros((4, 4), ">u2"), "got >u2"),
    "a line": (np.zeros(4, np.uint8), r"got \(4,\)"),
    "a batch": (np.zeros((1, 4, 4, 3), np.uint8), r"got \(1, 4, 4, 3\)"),
    "five channels": (np.zeros((4, 4, 5), np.uint8), r"got \(4, 4, 5\)"),
    "channels first": (np.zeros((3, 4, 7), np.uint8), r"got \(3, 4, 7\)"),
    "no rows": (np.zeros((0, 4, 3), np.uint8), r"not empty, got \(0, 4, 3\)"),
    "no channels": (np.zeros((4, 4, 0), np.uint8), r"got \(4, 4, 0\)"),
}


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_what_is_no_image_is_refused(case):
    image, words = BAD_IMAGES[case]
    with pytest.raises(ValueError, match=words):
        restorer_of()(image)


def test_without_the_guard_what_is_not_finite_is_an_error_and_not_a_white_image():
    network = network_of()
    torch.nn.init.constant_(network.ending.bias, math.nan)
    with pytest.raises(ValueError, match="are NaN or infinite; check the model's precision"):
        Restorer([network], RECIPE)(image_of((8, 8, 3), "uint8"))


# The guard


GUARDED = replace(RECIPE, guard=True)


@pytest.mark.parametrize(
    ("bias", "words"), [(math.nan, "192 of 192 restored values are not finite"), (0.6, "of full range from its input")]
)
def test_an_implausible_result_is_given_up_for_the_input(bias, words):
    network = network_of()
    torch.nn.init.constant_(network.ending.bias, bias)
    image = np.full((8, 8, 3), 77, np.uint8)
    restored = Restorer([network], GUARDED).restore(image)
    assert words in restored.suspect
    np.testing.assert_array_equal(restored.pixels, image)


def test_a_plausible_result_is_not():
    image = image_of((20, 20, 4), "uint16")
    restored = Restorer([network_of()], GUARDED).restore(image)
    assert restored.suspect is None
    np.testing.assert_array_equal(restored.pixels, restorer_of()(image))


# What else a recipe asks for


@pytest.mark.parametrize("kind", KINDS)
def test_strength_blends_with_the_input(kind):
    image = image_of((18, 22, 3), kind)
    top = to_range(kind)
    full = expected(image)
    blended = image / top + 0.25 * (full - image / top)
    restored = restorer_of(replace(RECIPE, strength=0.25))(image)
    np.testing.assert_allclose(restored / top, blended.clip(0, 1), atol=1e-5 + (0 if kind == "float32" else 0.51 / top))


@pytest.mark.parametrize("tile", ["whole", 90])
def test_self_ensemble_is_the_mean_of_eight_views(tile):
    image = (mild_scene(7, 120)[:110, :97] + 1) / 3  # no view of it is clipped
    recipe = replace(RECIPE, tile=tile, halo=8)
    plain, total = restorer_of(recipe), np.zeros_like(image, dtype=np.float64)
    for mirrored in (False, True):
        for turns in range(4):
            view = np.rot90(image[:, ::-1] if mirrored else image, turns)
            back = np.rot90(plain(np.ascontiguousarray(view)), -turns)
            total += back[:, ::-1] if mirrored else back
    ensemble = restorer_of(replace(recipe, self_ensemble=True))(image)
    np.testing.assert_allclose(ensemble, total / 8, atol=1e-5)
    assert np.abs(ensemble - plain(image)).max() > 1e-3


@pytest.mark.parametrize("shape", [(21, 26, 3), (21, 26), (21, 26, 2), (21, 26, 4)], ids=str)
def test_a_chain_runs_one_network_after_the_other(shape):
    other = network_of(replace(SMALL, width=6))
    recipe = replace(RECIPE, steps=(RECIPE.steps[0], Step("b" * 64, tlc=False)))
    image = image_of(shape, "float32")
    once = restorer_of()(image)
    twice = Restorer([network_of(replace(SMALL, width=6))], replace(RECIPE, steps=(Step("b" * 64, tlc=False),)))(once)
    chained = Restorer([network_of(), other], recipe)(image)
    np.testing.assert_allclose(chained, twice, atol=1e-5)
    assert np.abs(chained - once).max() > 1e-2
    with pytest.raises(ValueError, match="2 networks needed, got 1"):
        Restorer([network_of()], recipe)


def test_deterministic_recipes_give_the_same_bits_on_any_number_of_threads():
    image = image_of((150, 131, 3), "float32")
    recipe = replace(RECIPE, deterministic=True)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 1):
            torch.set_num_threads(threads)
            results.append(restorer_of(recipe)(image))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert not torch.are_deterministic_algorithms_enabled()
    assert results[0].tobytes() == results[1].tobytes() == results[2].tobytes()


def test_torchs_switches_are_shared_by_images_that_want_the_same_and_waited_for_by_others():
    switches, order, inside, go_on = restore._Switches(), [], Barrier(3), Event()

    def use(deterministic):
        with switches.set(deterministic=deterministic, tf32=False):
            if deterministic:
                inside.wait(timeout=10)
                go_on.wait(timeout=10)
            order.append((deterministic, torch.are_deterministic_algorithms_enabled()))

    first, second, other = (Thread(target=use, args=(wish,), daemon=True) for wish in (True, True, False))
    first.start()
    second.start()
    inside.wait(timeout=10)  # both are in at once
    other.start()
    other.join(timeout=0.2)
    assert other.is_alive()
    go_on.set()
    for thread in (first, second, other):
        thread.join(timeout=10)
    assert order == [(True, True), (True, True), (False, False)]
    assert not torch.are_deterministic_algorithms_enabled()


def test_describe_says_network_and_windows():
    restorer = Restorer([network_of(NetConfig(width=8))], replace(RECIPE, steps=(Step("c" * 64),)))
    lines = restorer.describe().splitlines()
    assert lines[0].startswith("NAFNet, width 8, ")
    assert [line.rpartition("window ")[2] for line in lines[2:]] == [
        f"{side} x {side} px" for side in (384, 192, 96, 48, 24)
    ]


# Precision


@pytest.fixture
def low_precision(monkeypatch):
    """As on a CPU that computes in bf16 and float16; torch converts number by number where it does not."""
    monkeypatch.setattr(restore, "has_arithmetic", lambda _: True)


def test_a_cpu_without_the_arithmetic_falls_back(monkeypatch):
    monkeypatch.setattr(restore, "has_arithmetic", lambda precision: precision == "float32")
    image = image_of((20, 20, 3), "uint8")
    restored = restorer_of(replace(RECIPE, precision="bf16")).restore(image)
    assert restored.precision == "float32"
    assert "this CPU has no bf16 arithmetic" in restored.note
    np.testing.assert_array_equal(restored.pixels, restorer_of()(image))


def test_precision_that_disagrees_falls_back(low_precision, monkeypatch):
    image = mild_scene(5, 64)
    monkeypatch.setattr(restore, "AGREEMENT_DB", 300.0)
    restored = restorer_of(replace(RECIPE, precision="bf16")).restore(image)
    assert restored.precision == "float32"
    assert "bf16 agrees with float32 by" in restored.note
    np.testing.assert_array_equal(restored.pixels, restorer_of()(image))


def test_no_image_starts_in_a_precision_that_another_is_just_finding_bad(low_precision, monkeypatch):
    image = mild_scene(5, 64)
    monkeypatch.setattr(restore, "AGREEMENT_DB", 300.0)
    restorer = restorer_of(replace(RECIPE, precision="bf16"))
    compared, compare = [], restorer._compare

    def slowly(colour):
        compared.append(colour)
        time.sleep(0.2)
        return compare(colour)

    monkeypatch.setattr(restorer, "_compare", slowly)
    with ThreadPoolExecutor(2) as pool:
        seen = list(pool.map(restorer.restore, [image, image]))
    assert [one.precision for one in seen] == ["float32", "float32"]
    assert len(compared) == 1


def overflowing():
    """A network whose float16 maps overflow where the image is bright, and whose float32 ones do not."""
    network = network_of()
    with torch.no_grad():
        network.intro.weight *= 0
        network.intro.weight[:, :, 1, 1] = 3e4
        network.ending.weight *= 1e-9
    return network


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_later_overflow_falls_back_too(low_precision, deterministic):
    dark, bright = np.zeros((24, 24, 3), np.float32), np.full((24, 24, 3), 0.9, np.float32)
    restorer = Restorer([overflowing()], replace(RECIPE, precision="float16", deterministic=deterministic))
    exact = Restorer([overflowing()], RECIPE)
    seen = [restorer.restore(image) for image in (dark, bright, dark)]
    assert [restored.precision for restored in seen] == [
        "float16",
        "float32",
        "float16" if deterministic else "float32",  # there no image hangs on those before it
    ]
    np.testing.assert_array_equal(seen[1].pixels, exact(bright))


# Memory


def test_auto_takes_the_largest_tile_that_fits():
    networks, recipe = [network_of(NetConfig(width=8))], replace(RECIPE, tile="auto", halo=32)
    whole = Restorer([network_of(NetConfig(width=8))], recipe, memory=10**12)
    assert whole.tile(5000, 7000) is None
    needs = {tile: whole.process_bytes(5000, 7000, tile) for tile in (None, *LADDER)}
    assert list(needs.values()) == sorted(needs.values(), reverse=True)
    for tile, memory in needs.items():
        assert Restorer([network_of(NetConfig(width=8))], recipe, memory=memory).tile(5000, 7000) == tile
    least = Restorer(networks, recipe, memory=1)
    assert least.tile(5000, 7000) == LADDER[-1]
    assert least.tile(300, 500) is None  # no rung is smaller


def test_out_of_memory_goes_down_the_ladder_and_says_so(monkeypatch):
    image = image_of((700, 520, 3), "uint8")
    recipe = replace(RECIPE, tile="auto", halo=32)
    real = StripNetwork.__call__

    def short(self, piece):
        if piece.shape[0] > 640:
            torch.empty(2**50, dtype=torch.uint8)  # what torch says when it cannot have it
        return real(self, piece)

    monkeypatch.setattr(StripNetwork, "__call__", short)
    restored = Restorer([network_of()], recipe, memory=10**12).restore(image)
    assert restored.tile == 640
    assert restored.note == "out of memory as a whole"
    monkeypatch.undo()
    np.testing.assert_array_equal(restored.pixels, restorer_of(replace(recipe, tile=640))(image))


def test_where_nothing_fits_it_is_a_memory_error(monkeypatch):
    def short(self, piece):
        raise MemoryError

    monkeypatch.setattr(StripNetwork, "__call__", short)
    with pytest.raises(MemoryError, match="with tiles of 512 px: give the actor more memory"):
        Restorer([network_of()], replace(RECIPE, tile="auto", halo=32))(image_of((700, 520), "uint8"))


def test_other_errors_are_not_taken_for_it(monkeypatch):
    def broken(self, piece):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(StripNetwork, "__call__", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        restorer_of(replace(RECIPE, tile="auto"))(image_of((700, 520), "uint8"))


# Tiles


def test_a_tile_within_the_window_is_refused():
    """Crops of 32 px give a window of 48, and a last tile may be 4 px (the stride) short of the others."""
    assert restorer_of(replace(RECIPE, tile=52, halo=0)).tiles(52, 53) == 2
    with pytest.raises(ValueError, match="tile 51 px must exceed the TLC window of 48 px by 4 px"):
        restorer_of(replace(RECIPE, tile=51, halo=0))
    assert restorer_of(replace(GLOBAL, tile=48, halo=0)).tiles(50, 50) == 4
    with pytest.raises(ValueError, match="a tile of 200 px with a halo of 192 px keeps nothing"):
        restorer_of(replace(RECIPE, tile=200, halo=192))


def test_images_no_larger_than_a_tile_go_through_at_once():
    restorer = restorer_of(replace(RECIPE, tile=64, halo=0))
    assert (restorer.tiles(64, 64), restorer.tiles(64, 65), restorer.tiles(65, 65)) == (1, 2, 4)
    assert restorer_of().tiles(5000, 7000) == 1
    image = image_of((64, 50, 3), "uint8")
    np.testing.assert_array_equal(restorer(image), restorer_of()(image))


def test_tiles_with_tlc_agree_with_the_whole_image():
    """Measured: 152 dB with a halo of 96 px, 80 dB with 24. Without TLC a tile's mean is not the image's: 70 dB."""
    image = mild_scene(3, 440)[:301, :413]
    whole = restorer_of()(image)
    assert 0 < whole.min() < whole.max() < 1
    wide = restorer_of(replace(RECIPE, tile=256, halo=96))
    assert wide.tiles(301, 413) == 10
    assert agreement(wide(image), whole) > 120
    narrow = restorer_of(replace(RECIPE, tile=128, halo=24))(image)
    assert 60 < agreement(narrow, whole) < 100
    without = GLOBAL
    assert agreement(restorer_of(replace(without, tile=256, halo=96))(image), restorer_of(without)(image)) < 80


@pytest.mark.parametrize(("halo", "decibels"), [(192, 100), (256, 130)])
def test_tiles_of_a_photograph(halo, decibels):
    """The bundled weights with their own windows of 144 px. Without TLC a wider halo does not help."""
    photo = to_float(photographs()["motorcycle_left"])
    whole = Restorer.load("demo", tlc=True, tile="whole", guard=False)(photo)
    tiled = Restorer.load("demo", tlc=True, tile=576, halo=halo, guard=False).restore(photo)
    assert tiled.tiles > 1
    assert agreement(tiled.pixels, whole) > decibels
    everywhere = Restorer.load("demo", tlc=False, tile="whole", guard=False)(photo)
    without = Restorer.load("demo", tlc=False, tile=576, halo=halo, guard=False)(photo)
    assert 50 < agreement(without, everywhere) < 90


def test_tiles_of_integers_round_once():
    image = scene(4, 200)
    whole, tiled = restorer_of()(image), restorer_of(replace(RECIPE, tile=150, halo=48))(image)
    assert np.abs(whole.astype(int) - tiled).max() <= 1
    assert (whole != tiled).mean() < 1e-3


@pytest.mark.parametrize(("precision", "decibels"), [("bf16", 40), ("float16", 60)])
def test_low_precision_stays_close(precision, decibels, low_precision, monkeypatch):
    monkeypatch.setattr(restore, "AGREEMENT_DB", float(decibels))
    image = mild_scene(5, 128)
    close = restorer_of(replace(RECIPE, precision=precision)).restore(image)
    assert close.precision == precision
    assert decibels < agreement(close.pixels, restorer_of()(image)) < 100


def test_bf16_costs_a_photograph_nothing(low_precision):
    """Against float32 with the bundled weights; by the guard's own measure they agree too."""
    photo = photographs()["motorcycle_left"][100:420, 200:520]
    noisy = metrics.quantize(gaussian_noise(to_float(photo), 25 / 255, np.random.default_rng(0)), np.uint8)
    exact, close = (Restorer.load("demo", precision=name).restore(noisy) for name in ("float32", "bf16"))
    assert (close.precision, close.note) == ("bf16", None)
    scores = [metrics.psnr(restored.pixels, photo, data_range=255) for restored in (exact, close)]
    assert scores[0] > 27
    assert scores[1] == pytest.approx(scores[0], abs=0.01)


# Loading


@pytest.fixture
def weights(tmp_path):
    """A file as `nafnet train` writes it, for crops of 32 px."""
    checkpoint.save(tmp_path / "net.safetensors", network_of(), {"train_size": "32"})
    return tmp_path / "net.safetensors"


def test_load_reads_the_crop_off_the_file(weights):
    restorer = Restorer.load(weights)
    sha256 = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert restorer.recipe == Recipe((Step(sha256, tlc=True, train_size=32),))
    image = image_of((70, 60, 3), "uint8")
    np.testing.assert_array_equal(restorer(image), restorer_of()(image))
    np.testing.assert_array_equal(Restorer.load(str(weights))(image), restorer(image))


def test_load_takes_the_fields_of_a_recipe(weights):
    sha256 = checkpoint.load(weights).sha256
    loaded = Restorer.load(weights, tlc=True, train_size=64, precision="bf16", tile=256, halo=64, tf32=True)
    assert loaded.recipe == Recipe((Step(sha256, True, 64),), "bf16", 256, 64, tf32=True)
    assert Restorer.load(weights, tlc=False).recipe == Recipe((Step(sha256, tlc=False),))
    image = image_of((70, 60, 3), "float32")
    without = expected(image, train_size=None).clip(0, 1)
    np.testing.assert_allclose(Restorer.load(weights, tlc=False)(image), without, atol=1e-5)


def test_load_of_a_published_file(tmp_path, monkeypatch):
    path = tmp_path / "renamed.pth"
    torch.save({"params": network_of().state_dict()}, path)
    sha256 = checkpoint.load(path).sha256
    assert Restorer.load(path).recipe == Recipe((Step(sha256),))  # unknown: as published for GoPro
    row = catalog.CatalogEntry("known", "known.pth", SMALL, tlc=False, protocol="sidd", sha256=sha256, train_size=128)
    monkeypatch.setattr(catalog, "_ROWS", (row,))
    assert Restorer.load(path).recipe == Recipe((Step(sha256, tlc=False),))  # known by its content, whatever its name
    assert Restorer.load(path, tlc=True).recipe == Recipe((Step(sha256, train_size=128),))


def test_load_says_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError):
        Restorer.load("NAFNet-GoPro-width32")  # known, but not in the package: it has to be fetched first
    (tmp_path / "net.pth").write_text("no network")
    with pytest.raises(CheckpointError, match=r"net\.pth"):
        Restorer.load(tmp_path / "net.pth")


def test_the_bundled_network_removes_noise():
    restorer = Restorer.load("demo")
    assert restorer.recipe.steps[0].tlc == catalog.CATALOG["demo"].tlc
    assert Restorer.load("demo", tlc=True).recipe.steps[0].train_size == catalog.CATALOG["demo"].train_size
    clean = scene(10**8, 160)
    noisy = metrics.quantize(gaussian_noise(to_float(clean), 25 / 255, np.random.default_rng(0)), np.uint8)
    before = metrics.psnr(noisy, clean, data_range=255)
    assert before == pytest.approx(20.5, abs=0.7)
    assert metrics.psnr(restorer(noisy), clean, data_range=255) > before + 5


# Batches


def on_a_device(recipe=RECIPE, memory=2**32):
    """A restorer that takes the way of a GPU, on the processor under its longer name."""
    return Restorer([network_of()], recipe, device="cpu:0", memory=memory)


@pytest.mark.parametrize("make", [on_a_device, restorer_of])
@pytest.mark.parametrize("recipe", [RECIPE, replace(RECIPE, self_ensemble=True), replace(RECIPE, precision="bf16")])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_batch_gives_what_its_images_give_one_by_one(shape, recipe, make):
    images = [image_of(shape, "uint16", seed) for seed in range(5)]
    restorer, passes = make(recipe), []
    attempt = restorer._attempt
    restorer._attempt = lambda colour, *more: (passes.append(colour.shape), attempt(colour, *more))[1]
    together = restorer.restore_batch(images)
    assert passes == [(5, 19, 26, 1 if len(shape) == 2 or shape[2] < 3 else 3)]
    tolerance = {"atol": 1, "rtol": 0} if recipe.precision == "float32" else {"atol": 2**16 * 2**-8, "rtol": 0}
    for image, made in zip(images, together, strict=True):
        alone = make(recipe).restore(image)
        assert (made.pixels.shape, made.pixels.dtype, made.tiles) == (image.shape, image.dtype, 1)
        np.testing.assert_allclose(made.pixels.astype(int), alone.pixels.astype(int), **tolerance)
        assert (made.tile, made.precision, made.suspect) == (alone.tile, alone.precision, alone.suspect)


def test_a_batch_is_bounded_by_memory_and_by_pixels():
    restorer = on_a_device()
    weights = restorer.process_bytes(0, 0, None)
    one = restorer.process_bytes(64, 64, None) - weights
    assert on_a_device(memory=weights + 3 * one).batch(64, 64) == 3
    assert on_a_device(memory=weights).batch(64, 64) == 1
    assert restorer.batch(64, 64) == min(restore.BATCH_PIXELS // 64**2, (2**32 - weights) // one)
    assert restorer.batch(5000, 5000) == 1
    assert restorer_of().batch(64, 64) == restore.CPU_BATCH_PIXELS // 64**2
    for make in (on_a_device, restorer_of):
        assert make(replace(RECIPE, deterministic=True)).batch(64, 64) == 1  # bits must not hang on company


def test_a_batch_that_runs_out_of_memory_is_halved():
    restorer, passes = on_a_device(), []
    attempt = restorer._attempt

    def scarce(colour, *more):
        passes.append(len(colour) if colour.ndim == 4 else 1)
        if colour.ndim == 4 and len(colour) > 2:
            raise torch.OutOfMemoryError
        return attempt(colour, *more)

    restorer._attempt = scarce
    images = [image_of((19, 26, 3), "uint8", seed) for seed in range(5)]
    made = restorer.restore_batch(images)
    assert passes == [5, 2, 3, 1, 2]
    for image, one in zip(images, made, strict=True):
        np.testing.assert_allclose(one.pixels.astype(int), on_a_device()(image).astype(int), atol=1)
