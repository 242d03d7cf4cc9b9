"""Made data sets, read back with other libraries, through `datasets.find`, and through a check."""

import base64
import csv
import hashlib
import shutil
import subprocess
import sys
import tarfile
from io import BytesIO
from pathlib import Path

import lmdb
import numpy as np
import pytest
import scipy.io
from PIL import Image

from nafnet.images import Picture, decode, encode
from nafnet.metrics import psnr
from pipelines import check, containers, datasets, made, pack, submission
from pipelines.containers import open_collection
from pipelines.datasets import DataName
from pipelines.made import LAYOUTS, make
from pipelines.storage import StorageError, Store

SIZE = (48, 64)
ALL = [(like, layout) for like, layouts in LAYOUTS.items() for layout in layouts]


@pytest.fixture(autouse=True)
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NAFNET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(made, "_BLOCK_PX", 16)


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize(("like", "layout"), ALL)
def test_each_layout_is_found_and_pairs_up(tmp_path: Path, like: DataName, layout: str) -> None:
    make(like, tmp_path / "set", images=1 if like == "sidd" else 5, layout=layout, size=SIZE)
    found = datasets.find(like, str(tmp_path / "set"), variant="benchmark" if layout == "benchmark" else None)
    source = open_collection(found.source)
    entries = [entry for entry in source.list() if datasets.matches(entry.key, found.include)]
    assert len(entries) == (32 if like == "sidd" else 5)
    if found.reference is None:
        assert layout == "benchmark"
        return
    reference = open_collection(found.reference)
    partners = datasets.partners(entries, list(reference.list()), found.pair)
    for entry, partner in zip(entries, partners, strict=True):
        assert partner is not None, entry.key
        degraded, sharp = decode(source.read(entry.key)).pixels, decode(reference.read(partner.key)).pixels
        assert degraded.shape == sharp.shape == ((16, 16, 3) if like == "sidd" else (*SIZE, 3))
        assert 12 < psnr(degraded, sharp, data_range=255) < 45


@pytest.mark.parametrize(("like", "layout"), ALL)
def test_the_same_arguments_write_the_same_bytes(tmp_path: Path, like: DataName, layout: str) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make(like, tmp_path / name, images=1 if like == "sidd" else 3, layout=layout, size=SIZE, seed=seed)
    assert contents(tmp_path / "a") == contents(tmp_path / "b") != contents(tmp_path / "c")


def test_gopro_as_others_read_it(tmp_path: Path) -> None:
    make("gopro", tmp_path / "tree", images=4, size=SIZE)
    names = sorted(path.name for path in (tmp_path / "tree" / "test").iterdir())
    assert names == ["GOPR0384_11_00", "GOPR0384_11_01"]
    frames = {
        kind: np.asarray(Image.open(tmp_path / "tree" / "test" / names[0] / kind / "000001.png"))
        for kind in ("blur", "blur_gamma", "sharp")
    }
    assert not np.array_equal(frames["blur"], frames["blur_gamma"])
    make("gopro", tmp_path / "flat", images=4, layout="flat", size=SIZE)
    flat = np.asarray(Image.open(tmp_path / "flat" / "test" / "input" / f"{names[0]}-000001.png"))
    np.testing.assert_array_equal(flat, frames["blur"])
    make("gopro", tmp_path / "lmdb", images=4, layout="lmdb", size=SIZE)
    folder = tmp_path / "lmdb" / "test" / "target.lmdb"
    assert (folder / "meta_info.txt").read_text().splitlines()[0] == f"{names[0]}-000001.png (48,64,3) 1"
    with lmdb.open(str(folder), readonly=True, lock=False) as environment, environment.begin() as view:
        stored = decode(view.get(f"{names[0]}-000001".encode())).pixels
    np.testing.assert_array_equal(stored, frames["sharp"])
    make("gopro", tmp_path / "tar", images=4, layout="tar", size=SIZE)
    with tarfile.open(tmp_path / "tar" / "test" / "gopro-000000.tar") as archive:
        assert archive.getnames()[:2] == [f"{names[0]}-000001.input.png", f"{names[0]}-000001.target.png"]


def test_sidd_as_others_read_it(tmp_path: Path) -> None:
    make("sidd", tmp_path / "mat", images=2)
    noisy, clean = (
        scipy.io.loadmat(tmp_path / "mat" / f"{name}.mat")[name]
        for name in ("ValidationNoisyBlocksSrgb", "ValidationGtBlocksSrgb")
    )
    assert noisy.shape == clean.shape == (2, 32, 16, 16, 3)
    assert noisy.dtype == np.uint8
    assert not np.array_equal(clean[0, 0], clean[1, 0])


def test_reds_scores_every_tenth_frame(tmp_path: Path) -> None:
    make("reds", tmp_path / "set", images=12, size=SIZE)
    found = datasets.find("reds", str(tmp_path / "set"))
    every = [entry.key for entry in open_collection(found.source).list()]
    scored = [key for key in every if datasets.matches(key, found.include)]
    assert (len(every), len(scored)) == (16, 12)
    assert all(int(Path(key).stem) % 10 == 9 for key in scored)


def test_impossible_sets_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"reds has no layout 'tar': there are tree, lmdb; images must be 1 to 300"):
        make("reds", tmp_path / "x", images=301, layout="tar")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(FileExistsError, match=r"is not empty \(thesis.tex\)"):
        make("gopro", tmp_path / "full", images=1)


# Looking for a data set, and at it


def test_a_folder_may_be_called_like_a_pattern(tmp_path: Path) -> None:
    place = make("gopro", tmp_path / "[old] * ?", images=1, size=SIZE)
    assert datasets.find("gopro", str(place)).layout == "tree of sequences"


def test_what_is_not_there_is_said_with_what_is(tmp_path: Path) -> None:
    make("reds", tmp_path / "set", images=2, size=SIZE)
    with pytest.raises(StorageError, match=r"no gopro data set at .*There is: val\. That looks like reds"):
        datasets.find("gopro", str(tmp_path / "set"))
    with pytest.raises(StorageError, match="nothing at"):
        datasets.find("gopro", str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="reds has no variant 'gamma'"):
        datasets.find("reds", str(tmp_path / "set"), variant="gamma")


def test_a_check_names_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "set" / "test"
    make("gopro", tmp_path / "set", images=8, size=SIZE)
    protocol = check.PROTOCOLS["gopro"]
    monkeypatch.setitem(check.PROTOCOLS, "gopro", type(protocol)("gopro", True, 8, 8))
    assert check.check("gopro", str(tmp_path / "set")).problems == ()

    first, second = sorted(root.iterdir())
    (first / "sharp" / "000001.png").unlink()
    (second / "blur" / "000002.png").unlink()
    (second / "blur" / "000004.png").write_bytes((second / "blur" / "000003.png").read_bytes())
    (second / "blur" / "000001.png").write_bytes(b"")
    findings = check.check("gopro", str(tmp_path / "set"))
    assert findings.problems == (
        "7 images, the published mean is over 8",
        f"1 files are empty: {second.name}/blur/000001.png",
        f"1 images have no reference: {first.name}/blur/000001.png",
        f"1 references have no image: {second.name}/sharp/000002.png",
        f"1 images are copies of others: {second.name}/blur/000004.png",
        f"1 of 12 images that were opened cannot be read: {second.name}/blur/000001.png",
    )
    assert findings.remarks[0].startswith("blur_gamma is there, too")
    assert findings.sizes == (("64x48", 6),)
    gamma = check.check("gopro", str(tmp_path / "set"), variant="gamma")
    assert any("images of blur_gamma" in problem for problem in gamma.problems)
    text = "\n".join(check.lines(findings))
    assert "verdict    not what was published" in text


def test_a_tree_of_the_other_blur_alone_is_named(tmp_path: Path) -> None:
    root = make("gopro", tmp_path / "set", images=2, size=SIZE)
    for folder in root.rglob("blur"):
        shutil.rmtree(folder)
    with pytest.raises(
        StorageError, match=r"tree of sequences, blur_gamma .* alone, .*ask for it with --variant gamma"
    ):
        check.check("gopro", str(root))


def test_references_of_another_size_or_unreadable_are_named(tmp_path: Path) -> None:
    root = make("gopro", tmp_path / "set", images=2, layout="flat", size=SIZE)
    first, second = sorted((root / "test" / "target").iterdir())
    first.write_bytes(encode(Picture(np.zeros((8, 8, 3), np.uint8), "PNG")))
    second.write_bytes(b"no image")
    problems = check.check("gopro", str(root)).problems
    assert f"2 of their references are of another size or cannot be read: {first.name}, {second.name}" in problems


@pytest.mark.parametrize("layout", ["tree", "flat", "lmdb", "tar"])
def test_copies_are_found_in_containers_too(tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make("gopro", tmp_path / "set", images=4, layout=layout, size=SIZE)
    found = datasets.find("gopro", str(tmp_path / "set"))
    before, after = [e.key for e in open_collection(found.source).list() if datasets.matches(e.key, found.include)][:2]
    assert not any("copies" in problem for problem in check.check("gopro", str(tmp_path / "set")).problems)
    containers._open.cache_clear()  # an LMDB is opened once in a process
    double(Path(found.source), before, after)
    containers._open.cache_clear()
    assert f"1 images are copies of others: {after}" in check.check("gopro", str(tmp_path / "set")).problems
    monkeypatch.setattr(check, "_HASHED_BYTES", 0)
    findings = check.check("gopro", str(tmp_path / "set"))
    assert not any("copies" in problem for problem in findings.problems)
    assert any(remark.endswith("2 more were not read") for remark in findings.remarks)


def double(source: Path, before: str, after: str) -> None:
    """Give the second key of a folder, an LMDB or shards the content of the first."""
    if source.suffix == ".lmdb":
        with lmdb.open(str(source), map_size=2**24) as environment, environment.begin(write=True) as write:
            write.put(Path(after).stem.encode(), write.get(Path(before).stem.encode()))
    elif source.suffix == ".tar":
        shard = source.parent / after.partition("/")[0]
        data = open_collection(str(source)).read(before)
        with tarfile.open(shard, "a") as archive:  # of members of one name the last counts
            member = tarfile.TarInfo(after.partition("/")[2])
            member.size = len(data)
            archive.addfile(member, BytesIO(data))
    else:
        (source / after).write_bytes((source / before).read_bytes())


def test_copied_blocks_are_found(tmp_path: Path) -> None:
    make("sidd", tmp_path / "set", images=1)
    assert not any("copies" in remark for remark in check.check("sidd", str(tmp_path / "set")).remarks)
    name = "ValidationNoisyBlocksSrgb"
    array = scipy.io.loadmat(tmp_path / "set" / f"{name}.mat")[name]
    array[0, 9] = array[0, 4]
    scipy.io.savemat(tmp_path / "set" / f"{name}.mat", {name: array})
    containers._open.cache_clear()
    assert "1 images are copies of others: 0000_09.png" in check.check("sidd", str(tmp_path / "set")).remarks


def test_times_are_not_taken_for_content(tmp_path: Path) -> None:
    """A store that has no MD5 tells size and time: copies have another time, and files of one time differ."""
    make("gopro", tmp_path / "set", images=4, layout="flat", size=SIZE)
    root = f"memory://{tmp_path.name}"
    for path in sorted((tmp_path / "set" / "test").rglob("*.png")):
        Store(root).write(str(path.relative_to(tmp_path / "set" / "test")), path.read_bytes())
    first, second, *rest = [entry.key for entry in Store(f"{root}/input").list()]
    inputs = Store(f"{root}/input")
    data = inputs.read(first)
    inputs.write(second, data)
    for key in rest:
        inputs.write(key, data[:-1] + key.encode()[-5:-4])
    moment = inputs.info(first)["created"]
    for key in rest:
        inputs.fs.store[inputs._path(key)].created = moment
    assert f"1 images are copies of others: {second}" in check.check("gopro", root).problems


def test_a_buckets_checksums_spare_reading(tmp_path: Path, s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make("gopro", tmp_path / "set", images=4, layout="flat", size=SIZE)
    for path in (tmp_path / "set" / "test").rglob("*.png"):
        Store(f"{s3_url}/copies").write(str(path.relative_to(tmp_path / "set" / "test")), path.read_bytes())
    inputs = Store(f"{s3_url}/copies/input")
    first, second, *_ = [entry.key for entry in inputs.list()]
    inputs.write(second, inputs.read(first))
    monkeypatch.setattr(check, "_HASHED_BYTES", 0)
    assert f"1 images are copies of others: {second}" in check.check("gopro", f"{s3_url}/copies").problems


def test_the_checksum_of_a_container_is_none_of_its_items(tmp_path: Path, s3_url: str) -> None:
    for name in ("input.lmdb", "target.lmdb"):
        with lmdb.open(str(tmp_path / name), map_size=2**20) as environment, environment.begin(write=True) as write:
            for i in range(3):
                write.put(b"%d" % i, b"of one size: %d" % i)
        Store(f"{s3_url}/lmdb").write(f"{name}/data.mdb", (tmp_path / name / "data.mdb").read_bytes())
    findings = check.check("gopro", f"{s3_url}/lmdb")
    assert findings.images == 3
    assert not any("copies" in problem for problem in findings.problems)


_EXPAND = """
import sys
from pathlib import Path
from pipelines.matlab import expand
from tests.peak import peak_bytes
before = peak_bytes()
with open(sys.argv[1], "rb") as file:
    expand(file, Path(sys.argv[2]), "blocks")
print(peak_bytes() - before)
"""


def test_blocks_are_never_all_in_memory(tmp_path: Path) -> None:
    blocks = np.zeros((24, 32, 256, 256, 3), np.uint8)
    blocks[-1, -1] = 7
    scipy.io.savemat(tmp_path / "blocks.mat", {"blocks": blocks}, do_compression=True)
    command = [sys.executable, "-c", _EXPAND, str(tmp_path / "blocks.mat"), str(tmp_path / "blocks.npy")]
    taken = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert int(taken) < blocks.nbytes / 2
    np.testing.assert_array_equal(np.load(tmp_path / "blocks.npy", mmap_mode="r")[-1, -1], blocks[-1, -1])


def test_extra_references_are_those_that_an_image_should_have(tmp_path: Path) -> None:
    make("reds", tmp_path / "set", images=4, size=SIZE)
    findings = check.check("reds", str(tmp_path / "set"))
    assert findings.problems == ("4 images, the published mean is over 300",)  # frames 0 and 1 are no extra ones


# Out again


def test_packed_shards_hold_every_image_once(tmp_path: Path) -> None:
    make("gopro", tmp_path / "set", images=5, layout="flat", size=SIZE)
    source = tmp_path / "set" / "test" / "input"
    shards = list(pack.pack(str(source), str(tmp_path / "out"), name="blur", shard_images=2))
    assert [count for _, count in shards] == [2, 2, 1]
    packed = open_collection(str(tmp_path / "out" / "blur-{000000..000002}.tar"))
    assert [packed.read(entry.key) for entry in packed.list()] == [
        path.read_bytes() for path in sorted(source.iterdir())
    ]
    first = (tmp_path / "out" / "blur-000000.tar").read_bytes()
    list(pack.pack(str(source), str(tmp_path / "again"), name="blur", shard_images=2))
    assert (tmp_path / "again" / "blur-000000.tar").read_bytes() == first


def test_names_in_a_shard_end_at_their_first_dot(tmp_path: Path) -> None:
    assert pack.member_name("a/b.c.PNG") == "a_b-c.png"
    for name in ("a/b.png", "a_b.png"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(b"x")
    with pytest.raises(StorageError, match=r"a/b\.png and a_b\.png would both be called a_b\.png"):
        list(pack.pack(str(tmp_path / "in"), str(tmp_path / "out")))


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize("form", ["csv", "mat"])
def test_a_submission_reads_back(tmp_path: Path, s3_url: str, form: str, remote: bool) -> None:
    make("sidd", tmp_path / "set", images=2, layout="benchmark")
    name = "BenchmarkNoisyBlocksSrgb"
    array = scipy.io.loadmat(tmp_path / "set" / f"{name}.mat")[name]
    home = f"{s3_url}/{tmp_path.name}" if remote else str(tmp_path / "run")
    blocks, run = open_collection(str(tmp_path / "set" / f"{name}.mat")), Store(home)
    for entry in blocks.list():
        run.write(f"images/{entry.key}", blocks.read(entry.key))
    place, count = submission.write_submission(home, form)  # type: ignore[arg-type]
    assert count == 64
    written = run.read(run.key(place))
    if form == "mat":
        np.testing.assert_array_equal(scipy.io.loadmat(BytesIO(written))["DenoisedBlocksSrgb"], array)
    else:
        csv.field_size_limit(10**7)
        rows = list(csv.DictReader(written.decode().splitlines()))
        assert rows[33]["ID"] == "33"
        assert base64.b64decode(rows[33]["BLOCK"]) == array[1, 1].tobytes()
    run.write("images/0001_31.png", encode(Picture(np.zeros((256, 256, 1), np.uint8), "PNG")))
    with pytest.raises(StorageError, match=r"not all 8-bit RGB and of one size: 0001_31\.png"):
        submission.write_submission(home, form)  # type: ignore[arg-type]
    run.delete("images/0001_05.png")
    with pytest.raises(StorageError, match=r"0001_05\.png missing"):
        submission.write_submission(home, form)  # type: ignore[arg-type]
