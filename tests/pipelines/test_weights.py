"""From what a person names to a file on this machine."""

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest

from nafnet import catalog
from nafnet.checkpoint import CheckpointError
from pipelines.weights import locate


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NAFNET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_bundled_weights_and_files_are_found_without_a_network(checkpoint_file: Path) -> None:
    assert locate("demo").name == "demo.safetensors"
    assert locate(str(checkpoint_file)) == checkpoint_file


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*nafnet-gopro.*NAFNet-GoPro-width32"):
        locate("nafnet-gopro")


def test_a_url_is_fetched_once(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "net.pth").write_bytes(b"tensors")
    url = f"file://{tmp_path}/net.pth"
    fetched = locate(url)
    assert fetched.parent == cache
    assert fetched.read_bytes() == b"tensors"
    (tmp_path / "net.pth").unlink()
    assert locate(url) == fetched


def test_a_published_file_is_taken_from_the_cache_or_fetched_into_it(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = b"published tensors"
    (tmp_path / "NAFNet-SIDD-width32.pth").write_bytes(data)
    entry = replace(catalog.CATALOG["NAFNet-SIDD-width32"], sha256=hashlib.sha256(data).hexdigest())
    monkeypatch.setitem(catalog.CATALOG, entry.name, entry)
    monkeypatch.setattr(catalog, "_MIRROR", f"file://{tmp_path}/")
    assert locate(entry.name) == cache / entry.file
    assert (cache / entry.file).read_bytes() == data


def test_without_a_network_the_error_names_file_hash_and_place(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "_MIRROR", "file:///no/such/mirror/")
    with pytest.raises(CheckpointError) as caught:
        locate("NAFNet-GoPro-width32")
    assert "19394e6155d12ef6371d1d57496f87f0ec88f92bdffa27c0792690722d5d1a5c" in str(caught.value)
    assert str(cache / "NAFNet-GoPro-width32.pth") in str(caught.value)
    assert not list(cache.glob("*.pth"))
    with pytest.raises(CheckpointError, match="no public copy is known: fetch Baseline-SIDD-width64"):
        locate("Baseline-SIDD-width64")
