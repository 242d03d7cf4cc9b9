"""Which reference belongs to which image, and which images a job selects."""

import pytest

from pipelines.datasets import matches, partners
from pipelines.storage import Entry


def entries(*keys: str) -> list[Entry]:
    return [Entry(key, 1, "f") for key in keys]


def test_the_same_key_wins_over_the_same_stem() -> None:
    assert partners(entries("a/1.jpg"), entries("a/1.jpg", "a/1.png", "b/1.png")) == entries("a/1.jpg")


def test_one_other_extension_is_found_and_two_are_not() -> None:
    found = partners(entries("1.jpg", "2.jpg", "2.tif", "3.png"), entries("1.png", "2.png", "2.tif"))
    assert found == [Entry("1.png", 1, "f"), None, Entry("2.tif", 1, "f"), None]


def test_a_rule_names_the_reference_whatever_its_extension() -> None:
    keys = entries("s/blur/1.png", "s/blur/2.png", "t/blurred 3.png", "t/4.png")
    found = partners(keys, entries("s/sharp/1.png", "s/sharp/2.tif", "t/sharpred 3.png", "t/4.png"), "blur=sharp")
    assert [one and one.key for one in found] == ["s/sharp/1.png", "s/sharp/2.tif", "t/sharpred 3.png", None]


def test_no_references_are_no_partners() -> None:
    assert partners(entries("a.png"), []) == [None]
    assert partners([], entries("a.png")) == []


@pytest.mark.parametrize(
    ("key", "globs", "fits"),
    [
        ("a/B.PNG", ("*.jpg", "*.png"), True),
        ("a/b.png", ("B.*",), True),
        ("a/b.png", ("A/*",), True),
        ("a/b.png", ("a/b", "b", "[!b].png"), False),
        ("a/b\nc.png", ("*.png",), True),
        ("a/b.png", (), False),
    ],
)
def test_globs_fit_the_whole_key_or_its_last_part(key: str, globs: tuple[str, ...], fits: bool) -> None:
    assert matches(key, globs) is fits
