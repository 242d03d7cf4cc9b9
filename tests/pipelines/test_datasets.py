"""Which reference belongs to which image."""

from pipelines.datasets import partners
from pipelines.storage import Entry


def entries(*keys: str) -> list[Entry]:
    return [Entry(key, 1, "f") for key in keys]


def test_the_partners_wins_over_the_same_stem() -> None:
    find = partners(entries("a/1.png", "a/1.jpg", "b/1.png"))
    assert find("a/1.jpg") == Entry("a/1.jpg", 1, "f")


def test_one_other_extension_is_found_and_two_are_not() -> None:
    find = partners(entries("1.png", "2.png", "2.tif"))
    assert find("1.jpg") == Entry("1.png", 1, "f")
    assert find("2.jpg") is None
    assert find("3.png") is None
