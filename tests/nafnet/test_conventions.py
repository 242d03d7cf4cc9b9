"""What a convention is called, what it settles, and which there are not."""

import itertools

import pytest

from nafnet.conventions import PROFILES, PROTOCOLS, Convention


def test_published_counts():
    assert {name: protocol.images for name, protocol in PROTOCOLS.items()} == {
        "gopro": 1111,
        "reds": 300,
        "sidd": 1280,
        "stored": None,
    }


@pytest.mark.parametrize(
    ("convention", "name", "words"),
    [
        (Convention("gopro"), "gopro", "the NAFNet authors' PSNR and SSIM-3D, prediction rounded"),
        (Convention("sidd"), "sidd", "the NAFNet authors' PSNR and SSIM-3D, prediction not rounded"),
        (Convention("sidd", "basicsr"), "sidd+basicsr", "BasicSR's PSNR and SSIM-2D, prediction rounded"),
        (
            Convention("gopro", "mmagic", y_channel=True),
            "gopro+mmagic+y",
            "MMagic's PSNR and SSIM-2D of the Y channel, prediction not rounded",
        ),
        (
            Convention("stored", "basicsr", crop_border=4, y_channel=True),
            "stored+basicsr+y+crop4",
            "BasicSR's PSNR and SSIM-2D of the Y channel without 4 px on each side, prediction rounded",
        ),
    ],
)
def test_names_and_words(convention, name, words):
    assert convention.name == name
    assert convention.words == words


def test_every_convention_is_found_by_its_name_and_no_two_share_one():
    all_of_them = [
        Convention(protocol, metrics, crop, y)
        for protocol, metrics, crop, y in itertools.product(PROTOCOLS, PROFILES, (0, 4, 40), (False, True))
        if PROFILES[metrics].variants or not (crop or y)
    ]
    assert [Convention.parse(convention.name) for convention in all_of_them] == all_of_them
    assert len({convention.name for convention in all_of_them}) == len(all_of_them) == 4 * (1 + 2 * 6)


@pytest.mark.parametrize("name", ["", "gopro+", "gopro+crop4+y", "gopro+basicsr+crop0", "gopro+basicsr+crop4 ", "+y"])
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match="no scoring convention"):
        Convention.parse(name)


def test_what_cannot_be_is_said_at_once():
    with pytest.raises(
        ValueError, match=r"crop_border: not with the metrics 'authors'.*y_channel: .*basicsr or mmagic"
    ):
        Convention("gopro", crop_border=4, y_channel=True)
    with pytest.raises(ValueError, match=r"no protocol 'set5': there are gopro.*no metric profile 'lpips': there are "):
        Convention("set5", "lpips")
    with pytest.raises(ValueError, match="crop_border must be 0 px or more, got -1"):
        Convention("gopro", "basicsr", crop_border=-1)
    with pytest.raises(ValueError, match="y_channel: not with the metrics 'authors'"):
        Convention.parse("gopro+y")
