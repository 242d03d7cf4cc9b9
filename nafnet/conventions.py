"""What a score means: the protocol of its data set, and the profile, whose way of computing it is followed.

Three ways are in print for the same images. They round or do not, and use one SSIM or the other, so a number says
nothing without its convention. Sources:

- `authors`: basicsr/metrics/psnr_ssim.py and basicsr/models/image_restoration_model.py of megvii-research/NAFNet;
- `basicsr`: basicsr/metrics/psnr_ssim.py and metric_util.py, and `tensor2img` in basicsr/utils/img_util.py, of
  XPixelGroup/BasicSR;
- `mmagic`: mmagic/evaluation/metrics/psnr.py, ssim.py and metrics_utils.py, and `destruct` in
  mmagic/models/data_preprocessors/data_preprocessor.py, of open-mmlab/mmagic.
"""

import re
from dataclasses import dataclass
from typing import Literal, Self

ProtocolName = Literal["gopro", "sidd", "reds", "stored"]
ProfileName = Literal["authors", "basicsr", "mmagic"]


@dataclass(frozen=True, slots=True)
class Protocol:
    """What is scored against what."""

    name: ProtocolName
    rounds: bool  # the authors round a float prediction to integers first, as if written to a file and read back
    images: int | None  # in the published test set; None where there is none
    bit_depth: int | None  # of the reference; None: any, its own maximum is the data range


@dataclass(frozen=True, slots=True)
class Profile:
    """Whose code is followed.

    Attributes:
        owner: in words, as in "BasicSR's PSNR".
        rounds: whether a float prediction is rounded to integers first; None: as the protocol says.
        scores: the fields of `nafnet.metrics.Scores` that it fills: the PSNR, its own SSIM, and what else is known.
        variants: its scores are also published of the Y channel and without a border.
    """

    name: ProfileName
    owner: str
    rounds: bool | None
    scores: tuple[str, ...]
    variants: bool


PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        Protocol("gopro", rounds=True, images=1111, bit_depth=8),
        Protocol("reds", rounds=True, images=300, bit_depth=8),
        Protocol("sidd", rounds=False, images=1280, bit_depth=8),
        Protocol("stored", rounds=True, images=None, bit_depth=None),
    )
}

PROFILES: dict[str, Profile] = {
    profile.name: profile
    for profile in (
        Profile("authors", "the NAFNet authors'", rounds=None, scores=("psnr", "ssim_3d", "ssim_2d"), variants=False),
        Profile("basicsr", "BasicSR's", rounds=True, scores=("psnr", "ssim_2d"), variants=True),
        Profile("mmagic", "MMagic's", rounds=False, scores=("psnr", "ssim_2d"), variants=True),
    )
}

_NAME = re.compile(r"(?P<protocol>[^+]+)(\+(?P<metrics>basicsr|mmagic))?(?P<y>\+y)?(\+crop(?P<crop>[1-9][0-9]*))?")


@dataclass(frozen=True, slots=True)
class Convention:
    """All that settles a score: a protocol, a profile, and the two variants that some profiles have.

    Attributes:
        protocol, metrics: names from `PROTOCOLS` and `PROFILES`.
        crop_border: pixels left out on each side.
        y_channel: the luma alone is scored (`nafnet.metrics.y_channel`).

    Raises ValueError, for all that is wrong at once: names that do not exist, a negative crop, or a variant of a
    profile that has none.
    """

    protocol: str
    metrics: str = "authors"
    crop_border: int = 0
    y_channel: bool = False

    def __post_init__(self) -> None:
        problems = []
        if self.protocol not in PROTOCOLS:
            problems.append(f"no protocol {self.protocol!r}: there are {', '.join(PROTOCOLS)}")
        if self.metrics not in PROFILES:
            problems.append(f"no metric profile {self.metrics!r}: there are {', '.join(PROFILES)}")
        elif not PROFILES[self.metrics].variants:
            used = {"crop_border": self.crop_border, "y_channel": self.y_channel}
            problems += [f"{name}: {no_variant(self.metrics)}" for name, value in used.items() if value]
        if self.crop_border < 0:
            problems.append(f"crop_border must be 0 px or more, got {self.crop_border}")
        if problems:
            raise ValueError("; ".join(problems))

    @classmethod
    def parse(cls, name: str) -> Self:
        """The convention of that `name`. ValueError where no convention has it."""
        found = _NAME.fullmatch(name)
        if not found:
            raise ValueError(f"no scoring convention {name!r}: expected one such as gopro or gopro+basicsr+y+crop4")
        return cls(found["protocol"], found["metrics"] or "authors", int(found["crop"] or 0), bool(found["y"]))

    @property
    def name(self) -> str:
        """As reports carry it: `gopro` for the authors' way, else such as `gopro+basicsr+y+crop4`."""
        parts = [self.protocol]
        if self.metrics != "authors":
            parts.append(self.metrics)
        if self.y_channel:
            parts.append("y")
        if self.crop_border:
            parts.append(f"crop{self.crop_border}")
        return "+".join(parts)

    @property
    def words(self) -> str:
        """As a person would say it: "BasicSR's PSNR and SSIM-2D of the Y channel, prediction rounded"."""
        channel = " of the Y channel" if self.y_channel else ""
        border = f" without {self.crop_border} px on each side" if self.crop_border else ""
        rounded = "rounded" if self.rounds else "not rounded"
        return f"{PROFILES[self.metrics].owner} PSNR and {label(self.scores[1])}{channel}{border}, prediction {rounded}"

    @property
    def rounds(self) -> bool:
        """Whether a float prediction is rounded to the reference's integers first."""
        own = PROFILES[self.metrics].rounds
        return PROTOCOLS[self.protocol].rounds if own is None else own

    @property
    def bit_depth(self) -> int | None:
        """Of the reference; None: any."""
        return PROTOCOLS[self.protocol].bit_depth

    @property
    def scores(self) -> tuple[str, ...]:
        """The fields of `nafnet.metrics.Scores` that it fills: the PSNR, its own SSIM, and what else is known."""
        return PROFILES[self.metrics].scores


def label(score: str) -> str:
    """A field of `nafnet.metrics.Scores` as people write it: PSNR, SSIM-3D."""
    return score.upper().replace("_", "-")


def no_variant(metrics: str) -> str:
    """Why a profile without variants refuses one."""
    others = " or ".join(profile.name for profile in PROFILES.values() if profile.variants)
    return f"not with the metrics {metrics!r}, whose published scores are of whole RGB images; use metrics {others}"
