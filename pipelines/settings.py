"""What a person may set: one validated model, the same for the command line, a deployment and a REPL."""

import os
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

IMAGE_GLOBS = ("*.png", "*.jpg", "*.jpeg", "*.tif", "*.tiff", "*.webp", "*.bmp")


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
    checkpoint: Annotated[
        str,
        Field(min_length=1, description="A file, a URL, or a name from the catalog (nafnet info lists them)"),
    ] = "demo"
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
        Literal["gopro", "sidd", "reds", "stored"] | None,
        Field(description="How scores are computed; unset: what the catalog says, else as stored"),
    ] = None
    precision: Annotated[Literal["float32", "bf16", "float16"], Field(description="Number format of the network")] = (
        "float32"
    )
    tile: Annotated[
        int | None, Field(ge=32, description="Restore in tiles of this side in px; unset: whole images")
    ] = None
    halo: Annotated[int, Field(ge=0, description="Margin around a tile that is restored and thrown away, px")] = 192
    actors: Annotated[
        int | None,
        Field(
            ge=1,
            description="Processes that hold the network; unset: as many as the GPUs hold, or one for four CPUs",
        ),
    ] = None
    gpus_per_actor: Annotated[float, Field(ge=0, description="GPUs each actor reserves; 0 restores on the CPU")] = 0
    ray_address: Annotated[
        str,
        Field(min_length=1, description="'local' starts Ray for this run; 'auto' or host:port joins a cluster"),
    ] = "local"
    include: Annotated[tuple[str, ...], Field(min_length=1, description="Globs of the keys to restore")] = IMAGE_GLOBS
    exclude: Annotated[tuple[str, ...], Field(description="Globs of the keys to leave out")] = ()
    limit: Annotated[int | None, Field(ge=1, description="Only the first so many keys, in order of their names")] = None
    max_failed: Annotated[int, Field(ge=0, description="How many images may fail before the run ends red")] = 0
    retry_failed: Annotated[bool, Field(description="Also redo the images that an earlier run could not restore")] = (
        False
    )
    max_megapixels: Annotated[float, Field(gt=0, description="Images larger than this are refused")] = 250

    @field_validator("checkpoint", "source", "output", "reference")
    @classmethod
    def _no_secrets(cls, value: str | None) -> str | None:
        user, at, _ = (value or "").partition("://")[2].partition("/")[0].rpartition("@")
        if at and ":" in user:
            raise ValueError("put credentials into the environment or a profile, never into a URL")
        if value and "://" in value and "?" in value and value.startswith(("http:", "https:")):
            raise ValueError("a URL's query may hold a signature, and URLs are recorded: give one without '?'")
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
    def _places_apart(self) -> Self:
        problems = []
        if _inside(self.output, self.source):
            problems.append(f"output {self.output} lies inside source {self.source}: it would be restored again")
        if _inside(self.source, self.output):
            problems.append(f"source {self.source} lies inside output {self.output}")
        if self.reference is not None and _inside(self.output, self.reference):
            problems.append(f"output {self.output} lies inside reference {self.reference}")
        if self.reference == self.source:
            problems.append("reference and source are the same place")
        if problems:
            raise ValueError("; ".join(problems))
        return self


def _inside(inner: str, outer: str) -> bool:
    return inner == outer or inner.startswith(outer.rstrip("/") + "/")
