"""What a person may set: one validated model, the same for the command line, a deployment and a REPL."""

import os
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from nafnet.conventions import PROFILES, ProfileName, ProtocolName, no_variant
from nafnet.images import check_output
from pipelines.datasets import IMAGES
from pipelines.storage_options import NAMED

StorageName = Annotated[str, Field(pattern=NAMED)]
TileName = Annotated[int, Field(ge=32)] | Literal["auto", "whole"]


class RestoreJob(BaseModel):
    """One restoration job. Unknown names and impossible values are refused, all at once, before anything starts."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    source: Annotated[
        str, Field(min_length=1, description="Folder or prefix of degraded images: a path or an fsspec URL")
    ]
    output: Annotated[str, Field(min_length=1, description="Prefix to write images/, report/ and report.html to")]
    reference: Annotated[
        str | None,
        Field(description="Folder or prefix of sharp originals with the same relative names, to score against"),
    ] = None
    pair: Annotated[
        str | None,
        Field(
            pattern="^[^=]+=[^=]*$",
            description="How a reference is named, as 'blur=sharp': that folder of the key, else that part of the "
            "file's name, is replaced",
        ),
    ] = None
    checkpoint: Annotated[
        tuple[Annotated[str, Field(min_length=1)], ...],
        Field(
            min_length=1,
            description="A file, a URL, or a name from the catalog (nafnet info lists them); "
            "several run one after the other",
        ),
    ] = ("demo",)
    tlc: Annotated[bool | None, Field(description="Local attention windows; unset: what the catalog says, else on")] = (
        None
    )
    train_size: Annotated[
        int | None,
        Field(
            ge=16,
            description="Side of the training crops in px (TLC window); unset: what the file says, else 256",
        ),
    ] = None
    protocol: Annotated[
        ProtocolName | None,
        Field(description="The data set that scores are for; unset: what the catalog says, else as stored"),
    ] = None
    metrics: Annotated[ProfileName, Field(description="Whose way of computing scores is followed")] = "authors"
    crop_border: Annotated[int, Field(ge=0, description="Margin that basicsr and mmagic leave out of scores, px")] = 0
    y_channel: Annotated[bool, Field(description="Score the luma alone, under basicsr and mmagic")] = False
    precision: Annotated[Literal["float32", "bf16", "float16"], Field(description="Number format of the network")] = (
        "float32"
    )
    tile: Annotated[
        TileName,
        Field(description="Side of tiles in px, whole, or auto: whole where it fits into memory, else the largest"),
    ] = "auto"
    halo: Annotated[int, Field(ge=0, description="Margin around a tile that is restored and thrown away, px")] = 192
    strength: Annotated[
        float, Field(gt=0, le=1, description="Share of the restored image in the result, the rest is the input")
    ] = 1
    self_ensemble: Annotated[
        bool, Field(description="The mean over eight flips and rotations, in eight times the time")
    ] = False
    guard: Annotated[bool, Field(description="Give up implausible results for the input, and say so")] = True
    deterministic: Annotated[bool, Field(description="The same bits on every run and with any number of actors")] = (
        False
    )
    format: Annotated[
        Literal["same", "png", "jpeg", "tiff", "webp", "bmp"], Field(description="File format to write")
    ] = "same"
    quality: Annotated[int | None, Field(ge=1, le=100, description="Of jpeg or webp; unset: 95, and lossless webp")] = (
        None
    )
    subsampling: Annotated[
        Literal["4:4:4", "4:2:2", "4:2:0"] | None, Field(description="Of a jpeg's colours; unset: 4:4:4")
    ] = None
    actors: Annotated[
        int | None,
        Field(
            ge=1,
            description="Processes that hold the network; unset: as many as free GPUs hold, or one for four free CPUs",
        ),
    ] = None
    max_actors: Annotated[
        int | None,
        Field(
            ge=1,
            description="Grow to so many processes as CPUs or GPUs become free and nodes join; unset: do not grow",
        ),
    ] = None
    gpus_per_actor: Annotated[float, Field(ge=0, description="GPUs each actor reserves; 0 restores on the CPU")] = 0
    ray_address: Annotated[
        str,
        Field(
            min_length=1,
            description="'local' starts Ray for this run; 'auto' or host:port joins a cluster; http://host:8265 "
            "submits the work to one as a job",
        ),
    ] = "local"
    ray_wheel: Annotated[
        str | None,
        Field(
            pattern=r"\.whl$",
            description="With http://: a wheel of this package to run there; unset: what the cluster has installed",
        ),
    ] = None
    time_limit: Annotated[
        float | None, Field(gt=0, description="Hours after which the run stops; the same run again goes on")
    ] = None
    include: Annotated[tuple[str, ...], Field(min_length=1, description="Globs of the keys to restore")] = IMAGES
    exclude: Annotated[tuple[str, ...], Field(description="Globs of the keys to leave out")] = ()
    limit: Annotated[int | None, Field(ge=1, description="Only the first so many keys, in order of their names")] = None
    max_failed: Annotated[int, Field(ge=0, description="How many images may fail before the run ends red")] = 0
    retry_failed: Annotated[bool, Field(description="Also redo the images that an earlier run could not restore")] = (
        False
    )
    fresh: Annotated[bool, Field(description="Start anew: what earlier runs reported does not count")] = False
    max_megapixels: Annotated[float, Field(gt=0, description="Images larger than this are refused")] = 250
    storage: Annotated[
        StorageName | None,
        Field(
            description="Where options of file systems (endpoint, keys) are kept: env:VARIABLE, file:PATH of a .json "
            "or .toml, block:NAME of a Prefect Secret; unset: the environment alone",
        ),
    ] = None

    @field_validator("tile", mode="before")
    @classmethod
    def _side_or_word(cls, value: object) -> object:
        side = int(value) if isinstance(value, str) and value.isdecimal() else value
        if side in ("auto", "whole") or (isinstance(side, int) and side >= 32):
            return side
        raise ValueError(f"takes auto, whole, or a side of 32 px or more, got {value!r}")

    @field_validator("checkpoint", mode="before")
    @classmethod
    def _one_or_several(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @field_validator("checkpoint")
    @classmethod
    def _no_secrets_in_any(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for one in value:
            cls._no_secrets(one)
        return value

    @field_validator("source", "output", "reference", "ray_address", "ray_wheel")
    @classmethod
    def _no_secrets(cls, value: str | None) -> str | None:
        user, at, _ = (value or "").partition("://")[2].partition("/")[0].rpartition("@")
        if at and ":" in user:
            raise ValueError("put credentials into the environment or a profile, never into a URL")
        if value and "://" in value and "?" in value and value.startswith(("http:", "https:")):
            raise ValueError("a URL's query may hold a signature, and URLs are recorded: give one without '?'")
        return value

    @field_validator("crop_border", "y_channel")
    @classmethod
    def _has_variants(cls, value: int, info: ValidationInfo) -> int:
        metrics = info.data.get("metrics")  # absent when it is itself refused
        if value and metrics and not PROFILES[metrics].variants:
            raise ValueError(no_variant(metrics))
        return value

    @field_validator("source", "output", "reference")
    @classmethod
    def _plain_prefix(cls, value: str | None) -> str | None:
        if value is None:
            return None
        value = value.removeprefix("file://")
        if "://" not in value:
            return os.path.normpath(Path(value).expanduser().absolute())
        return value.rstrip("/")

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        problems = []
        if _inside(self.output, self.source):
            problems.append(f"output {self.output} lies inside source {self.source}: it would be restored again")
        if _inside(self.source, self.output):
            problems.append(f"source {self.source} lies inside output {self.output}")
        if self.reference is not None and _inside(self.output, self.reference):
            problems.append(f"output {self.output} lies inside reference {self.reference}")
        if self.reference == self.source and self.pair is None:
            problems.append("reference and source are the same place: say with pair how references are named there")
        if self.deterministic and self.tile == "auto":
            problems.append("deterministic needs a tile of so many px or 'whole': auto goes by the memory at hand")
        remote = self.ray_address.startswith(("http://", "https://"))
        if self.max_actors is not None and self.max_actors < (self.actors or 1):
            problems.append(f"max_actors {self.max_actors} is less than actors {self.actors}")
        if self.ray_wheel is not None and not remote:
            problems.append(f"ray_wheel goes with a job that is submitted (http://...), not with {self.ray_address}")
        if remote and self.storage is not None and self.storage.startswith("block:"):
            problems.append(f"storage {self.storage} is known to Prefect, not to a cluster: name env: or file: there")
        if self.format != "same":
            try:
                check_output(self.format.upper(), self.quality, self.subsampling)
            except ValueError as error:
                problems.append(str(error))
        elif self.quality is not None or self.subsampling is not None:
            problems.append("quality and subsampling need a format to write: jpeg, or webp for quality alone")
        if problems:
            raise ValueError("; ".join(problems))
        return self


def _inside(inner: str, outer: str) -> bool:
    return inner == outer or inner.startswith(outer.rstrip("/") + "/")
