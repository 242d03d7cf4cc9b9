"""Tile plans as integers, for any shape, and the blending of pieces."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nafnet.tiling import BLEND_PX, Tile, plan_tiles, restore_tiles


def least(halo, stride):
    """The smallest tile: its halos, a band, and room for a second band that the next tile's must not meet."""
    return 2 * halo + BLEND_PX + max(2 * BLEND_PX, stride)


@st.composite
def plans(draw):
    """(length, height, tile, halo, stride): what a plan may be asked for."""
    stride = draw(st.sampled_from([2, 4, 8, 16, 64]))
    halo = draw(st.integers(0, 40))
    tile = least(halo, stride) + draw(st.integers(0, 70))
    return draw(st.integers(1, 700)), draw(st.integers(1, 260)), tile, halo, stride


def plan(case):
    length, height, tile, halo, stride = case
    return plan_tiles(height, length, tile_px=tile, halo_px=halo, stride=stride)


@settings(max_examples=150, deadline=None)
@given(plans())
def test_every_pixel_gets_shares_that_add_up_to_one(case):
    length, height = case[:2]
    total = np.zeros((height, length))
    for tile in plan(case):
        total[tile.rows.kept, tile.columns.kept] += np.outer(tile.rows.weights(), tile.columns.weights())
        assert tile.rows.weights().min() > 0
    np.testing.assert_allclose(total, 1, atol=1e-6)


@settings(max_examples=150, deadline=None)
@given(plans())
def test_tiles_lie_on_the_grid_and_keep_what_saw_its_halo(case):
    length, height, tile_px, halo, stride = case
    for tile in plan(case):
        for span, n in ((tile.rows, height), (tile.columns, length)):
            assert span.start % stride == 0
            assert 0 < span.stop - span.start <= tile_px
            assert 0 <= span.start < span.stop <= n
            # The network pads its input to the stride: only at the image's own border may a tile need that.
            assert span.stop == n or (span.stop - span.start) == tile_px
            assert span.kept.start == 0 if span.start == 0 else span.kept.start - span.start >= halo
            assert span.kept.stop == n if span.stop == n else span.stop - span.kept.stop >= halo


@settings(max_examples=150, deadline=None)
@given(plans())
def test_only_two_tiles_share_a_pixel_of_an_axis(case):
    """At most four pieces are added up anywhere, and a band fades between exactly two."""
    kept = sorted({(tile.columns.kept.start, tile.columns.kept.stop) for tile in plan(case)})
    assert kept[0][0] == 0
    assert kept[-1][1] == case[0]
    for (_, stop), (start, _) in itertools.pairwise(kept):
        assert stop - start == BLEND_PX
    for (_, stop), (start, _) in zip(kept, kept[2:], strict=False):
        assert stop <= start


@settings(max_examples=60, deadline=None)
@given(plans(), st.integers(1, 4))
def test_an_identity_network_is_the_identity(case, channels):
    length, height = case[:2]
    image = np.random.default_rng(0).random((height, length, channels), np.float32)
    before = image.copy()
    out = restore_tiles(image, plan(case), lambda piece: piece)
    assert out.dtype == np.float32
    np.testing.assert_allclose(out, image, atol=2e-7)
    np.testing.assert_array_equal(image, before)


@settings(max_examples=60, deadline=None)
@given(plans())
def test_a_local_filter_that_reaches_no_further_than_the_halo_leaves_no_seams(case):
    length, height, _, halo, _ = case
    reach = min(halo, 5)

    def mean_around(piece):
        padded = np.pad(piece, ((reach, reach), (reach, reach), (0, 0)))  # zeros, as a convolution pads
        rows, columns = piece.shape[:2]
        shifts = [(dy, dx) for dy in (0, reach, 2 * reach) for dx in (0, reach, 2 * reach)]
        return sum(padded[dy : dy + rows, dx : dx + columns] for dy, dx in shifts) / np.float32(9)

    image = np.random.default_rng(1).random((height, length, 1), np.float32)
    np.testing.assert_allclose(restore_tiles(image, plan(case), mean_around), mean_around(image), atol=1e-6)


def test_a_plan_written_out():
    spans = [tile.columns for tile in plan_tiles(1, 250, tile_px=100, halo_px=20, stride=4)]
    # A step is 100 - 2 * 20 - 16 = 44 px. The last start is 250 - 100 = 150, up to a multiple of 4.
    assert [(span.start, span.stop) for span in spans] == [(0, 100), (44, 144), (88, 188), (132, 232), (152, 250)]
    # A band lies in the middle of an overlap: (44 + 100 - 16) / 2 = 64.
    assert [span.fade_in for span in spans] == [None, 64, 108, 152, 184]
    assert [span.fade_out for span in spans] == [64, 108, 152, 184, None]
    assert spans[1].kept == slice(64, 124)
    ramp = spans[1].weights()[:BLEND_PX]
    np.testing.assert_allclose(ramp, (np.arange(16) + 0.5) / 16)
    np.testing.assert_allclose(spans[0].weights()[-BLEND_PX:], 1 - ramp)
    assert spans[1].weights()[BLEND_PX:-BLEND_PX].tolist() == [1] * 28


@pytest.mark.parametrize("size", [(1, 1), (3, 100), (99, 100), (100, 100)])
def test_a_small_image_is_one_tile(size):
    [tile] = plan_tiles(*size, tile_px=100, halo_px=20, stride=16)
    assert (tile.rows.start, tile.rows.stop, tile.columns.start, tile.columns.stop) == (0, size[0], 0, size[1])
    assert isinstance(tile, Tile)


def test_one_pixel_more_takes_two_tiles():
    rows = [tile.rows for tile in plan_tiles(101, 100, tile_px=100, halo_px=20, stride=16)]
    assert [(span.start, span.stop) for span in rows] == [(0, 100), (16, 101)]


@pytest.mark.parametrize(("halo", "stride"), [(0, 2), (20, 8), (20, 16), (192, 16), (5, 64)])
def test_a_tile_too_small_for_its_halo_is_refused(halo, stride):
    smallest = least(halo, stride)
    assert plan_tiles(9, 9, tile_px=smallest, halo_px=halo, stride=stride)
    with pytest.raises(ValueError, match=f"halo of {halo} px keeps nothing: take {smallest} px or more"):
        plan_tiles(9, 9, tile_px=smallest - 1, halo_px=halo, stride=stride)


@pytest.mark.parametrize("stride", [2, 4, 8])
def test_bands_of_a_tile_never_meet(stride):
    """The last tile may start a single stride after the one before it, which crowds the bands of that one."""
    tile_px = least(0, stride)
    step = (tile_px - BLEND_PX) // stride * stride
    length = step + stride + tile_px
    tiles = plan_tiles(1, length, tile_px=tile_px, halo_px=0, stride=stride)
    assert [tile.columns.start for tile in tiles] == [0, step, step + stride]
    total = np.zeros(length)
    for tile in tiles:
        total[tile.columns.kept] += tile.columns.weights()
    np.testing.assert_allclose(total, 1, atol=1e-6)
