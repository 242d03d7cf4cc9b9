"""What travels between the steps: one `Pair` per input before restoring, one `ReportRow` per input after."""

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

import pyarrow as pa


class Status(StrEnum):
    """How one input ended. Everything but `restored` carries a reason that a person can act on."""

    RESTORED = "restored"
    UNREADABLE = "unreadable"  # the bytes are not an image, or are damaged
    MISSING = "missing"  # the source or its reference is not there
    MISMATCHED = "mismatched"  # the reference has another size or number of channels
    REFUSED = "refused"  # an image this job will not touch: too large, several frames, a hostile key
    SUSPECT = "suspect"  # the result was implausible: the input was written in its place
    CRASHED = "crashed"  # the process died or failed while it held this image


WRITTEN = (Status.RESTORED, Status.SUSPECT)  # ends that left an image


@dataclass(frozen=True, slots=True)
class Pair:
    """One input of a job. `fingerprint` changes when the source changes: its etag, or size and mtime."""

    key: str  # relative to the source prefix, '/' between parts
    source: str  # URL
    reference: str | None  # URL of the sharp or clean original
    output: str  # URL that the restored image will have
    size: int  # bytes
    fingerprint: str


MANIFEST_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("reference", pa.string()),
        pa.field("output", pa.string(), nullable=False),
        pa.field("size", pa.int64(), nullable=False),
        pa.field("fingerprint", pa.string(), nullable=False),
    ]
)


@dataclass(frozen=True, slots=True)
class ReportRow:
    """How one input ended. Scores are None without a reference; sizes are None when nothing was decoded.

    `psnr_input` and its kin score the degraded image against the reference, `psnr` the restored one, dB.
    `protocol` names the convention they are all under, such as `gopro` or `gopro+basicsr+y+crop4` (see
    `nafnet.conventions.Convention`); one whose SSIM is 2-D leaves `ssim_3d` None. `seconds` is the time in the
    network alone, shared by the images that an actor has in it at once. `tile` is the side in px of the `tiles` that
    the image went through, None when it went whole; `precision` is that of the network after any fallback, and `note`
    says what went otherwise than asked. `digest` is that of the written pixels, the same in every format that keeps
    them (`stages.digest`). `retries` is how many requests to storage had to be made again to fetch and finish it.
    """

    key: str
    status: str
    recipe: str
    source: str
    size: int
    fingerprint: str
    finished_at: datetime
    reason: str | None = None
    width: int | None = None
    height: int | None = None
    channels: int | None = None
    bit_depth: int | None = None
    protocol: str | None = None
    psnr_input: float | None = None
    psnr: float | None = None
    ssim_2d_input: float | None = None
    ssim_2d: float | None = None
    ssim_3d_input: float | None = None
    ssim_3d: float | None = None
    seconds: float | None = None
    fetch_seconds: float | None = None
    finish_seconds: float | None = None
    retries: int | None = None
    tiles: int | None = None
    tile: int | None = None
    precision: str | None = None
    note: str | None = None
    digest: str | None = None
    reference: str | None = None
    output: str | None = None
    worker: str | None = None  # host and process id


REPORT_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        pa.field("reason", pa.string()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("channels", pa.int32()),
        pa.field("bit_depth", pa.int32()),
        pa.field("protocol", pa.string()),
        pa.field("psnr_input", pa.float64()),
        pa.field("psnr", pa.float64()),
        pa.field("ssim_2d_input", pa.float64()),
        pa.field("ssim_2d", pa.float64()),
        pa.field("ssim_3d_input", pa.float64()),
        pa.field("ssim_3d", pa.float64()),
        pa.field("seconds", pa.float64()),
        pa.field("fetch_seconds", pa.float64()),
        pa.field("finish_seconds", pa.float64()),
        pa.field("retries", pa.int32()),
        pa.field("tiles", pa.int32()),
        pa.field("tile", pa.int32()),
        pa.field("precision", pa.string()),
        pa.field("note", pa.string()),
        pa.field("digest", pa.string()),
        pa.field("recipe", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("reference", pa.string()),
        pa.field("output", pa.string()),
        pa.field("size", pa.int64(), nullable=False),
        pa.field("fingerprint", pa.string(), nullable=False),
        pa.field("worker", pa.string()),
        pa.field("finished_at", pa.timestamp("us", tz="UTC"), nullable=False),
    ]
)
