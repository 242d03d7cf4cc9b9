"""What a recipe holds, and what its hash tells apart."""

import hashlib
import json
from dataclasses import asdict, replace

import pytest

from nafnet import recipe as module
from nafnet.recipe import Recipe, Step

RECIPE = Recipe((Step("a" * 64),), tile=512)


def test_whole_numbers_hash_as_floats():
    assert Recipe((Step("w"),), strength=1).hash == Recipe((Step("w"),), strength=1.0).hash == Recipe((Step("w"),)).hash


def test_equal_recipes_hash_alike_and_every_field_counts():
    assert Recipe((Step("a" * 64),), tile=512).hash == RECIPE.hash
    assert len(RECIPE.hash) == 16
    int(RECIPE.hash, 16)
    others = {
        "steps": (Step("b" * 64),),
        "precision": "bf16",
        "tile": 640,
        "halo": 128,
        "strength": 0.5,
        "self_ensemble": True,
        "guard": False,
        "deterministic": True,
        "tf32": True,
        "output": "JPEG",
        "quality": 90,
        "subsampling": "4:2:0",
    }
    assert set(asdict(RECIPE)) == set(others)
    changed = [replace(RECIPE, **{name: value}) for name, value in others.items()]
    steps = [(Step("a" * 64, tlc=False),), (Step("a" * 64, train_size=128),), (Step("a" * 64), Step("b" * 64))]
    changed += [replace(RECIPE, steps=chain) for chain in steps]
    changed += [replace(RECIPE, tile=tile) for tile in ("auto", "whole")]
    assert len({RECIPE.hash, *(other.hash for other in changed)}) == 1 + len(changed)


def test_a_hash_can_be_made_again_elsewhere():
    content = {
        "deterministic": False,
        "guard": True,
        "halo": 192,
        "output": "same",
        "precision": "float32",
        "quality": None,
        "revision": module._PIXELS_REVISION,
        "self_ensemble": False,
        "steps": [{"weights": "w", "tlc": True, "train_size": 256}],
        "strength": 1.0,
        "subsampling": None,
        "tf32": False,
        "tile": "auto",
    }
    expected = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
    assert Recipe((Step("w"),)).hash == expected


def test_what_has_no_effect_is_dropped():
    assert Step("w", tlc=False, train_size=96) == Step("w", tlc=False)
    whole = replace(RECIPE, tile="whole", deterministic=True)
    assert replace(whole, halo=64) == whole


def test_weights_of_a_chain():
    assert Recipe((Step("a"), Step("b"))).weights == "a+b"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"steps": ()}, "at least one checkpoint"),
        ({"precision": "fp8"}, "precision must be one of float32, bf16, float16, got 'fp8'"),
        ({"tile": "big"}, "tile must be a number of px, 'auto' or 'whole', got 'big'"),
        ({"halo": -1}, "halo is a number of px, got -1"),
        ({"strength": 0}, "strength must be above 0 and at most 1, got 0"),
        ({"strength": 1.5}, "strength must be above 0 and at most 1, got 1.5"),
        ({"tile": "auto", "deterministic": True}, "cannot leave the tile to the memory at hand"),
    ],
)
def test_impossible_recipes_say_why(fields, words):
    with pytest.raises(ValueError, match=words):
        replace(RECIPE, **fields)


@pytest.mark.parametrize("train_size", [None, 0])
def test_tlc_needs_the_crop(train_size):
    with pytest.raises(ValueError, match=f"train_size is {train_size}"):
        Step("w", train_size=train_size)
