"""What there is to do: list the source once, pair it, drop what an earlier run finished, write manifest parts.

Collections are large: everything is a column, a million keys take a few hundred megabytes, and rows are made and
written a part at a time.
"""

import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from nafnet.images import extension
from pipelines.containers import Collection, open_collection
from pipelines.datasets import matches, partner_places
from pipelines.listing import LISTED, ROWS, is_listing, listed, read_listing, tables
from pipelines.parts import PartWriter, read_parquet, write_parquet
from pipelines.records import MANIFEST_SCHEMA, REPORT_SCHEMA, WRITTEN, Status
from pipelines.report import part_names, read_parts
from pipelines.settings import RestoreJob
from pipelines.storage import StorageError, Store

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run will do.

    Attributes:
        keys: of all inputs that the job selects, in their order.
        to_restore: how many of them are in the manifest's parts.
        finished: how many need nothing more.
        decided: how many have their row already, because their end is known without opening them.
        recipe: hash of the recipe that the pairs are to be restored under.
        source, reference: the collections that the pairs' keys and references lie in.
        place, parts: where the manifest's parts are.
        earlier: the report's parts that were there before.
    """

    keys: pa.ChunkedArray
    to_restore: int
    finished: int
    decided: int
    recipe: str
    source: str
    reference: str | None
    place: Store
    parts: tuple[str, ...]
    earlier: frozenset[str] = frozenset()

    @property
    def matched(self) -> int:
        """How many inputs the job selects."""
        return len(self.keys)

    def tables(self) -> Iterator[pa.Table]:
        """What is to be restored (`MANIFEST_SCHEMA`), in the order of `keys`, read back part by part."""
        for part in self.parts:
            yield read_parquet(self.place, part)

    def narrowed(self, keep: Callable[[pa.Array], pa.Array]) -> Self:
        """A plan of those of its pairs whose keys are kept (keys in, truth values out), in parts of their own."""
        run, parts, count = uuid.uuid4().hex[:12], list[str](), 0
        for table in self.tables():
            pairs = table.filter(keep(table["key"]))
            if len(pairs):
                parts.append(f"manifest/{run}-{len(parts):05d}.parquet")
                write_parquet(self.place, parts[-1], pairs)
                count += len(pairs)
        return replace(self, to_restore=count, parts=tuple(parts))


def plan(job: RestoreJob, recipe: str, protocol: str, *, place: Store | None = None) -> Plan:
    """Decide what is to be done for `job` under the recipe of this hash, scored under `protocol` (a convention's name).

    An input is finished when the report has its row for the same content (source and reference), recipe and
    protocol; with `job.retry_failed` only if that row says `restored`, with `job.fresh` never.

    What is to be restored is written below `manifest/`, and the rows of what cannot be below `report/`: of the output,
    or of `place`.

    Raises:
        StorageError: a location cannot be listed, or nothing in the source matches.
    """
    output = Store(job.output)
    place = place or output
    inputs = _open(job)
    keys = inputs.rows["key"]
    earlier = frozenset(part_names(output))
    finished, written = np.zeros(len(keys), np.bool_), np.zeros(len(keys), np.bool_)
    if not job.fresh:
        finished, written = _finished(output, inputs, recipe, protocol, restored_only=job.retry_failed)
    owner = None if job.format == "same" else _owners(keys, written, job.format)
    run, parts, counts = uuid.uuid4().hex[:12], list[str](), Counter[str]()
    for start in range(0, len(keys), ROWS):
        todo = ~finished[start : start + ROWS]
        rows = inputs.rows.slice(start, ROWS).filter(todo)
        ends = _ends(rows, owner and owner.slice(start, ROWS).filter(todo), inputs, output, job)
        known = pc.is_valid(ends["reason"])
        pairs = ends.filter(pc.invert(known)).select(MANIFEST_SCHEMA.names)
        if len(pairs):
            parts.append(f"manifest/{run}-{len(parts):05d}.parquet")
            write_parquet(place, parts[-1], pairs.cast(MANIFEST_SCHEMA))
        decided = ends.filter(known)
        if len(decided):
            PartWriter(place).write(_report(decided, recipe, inputs.source.url()))
        counts.update(pairs=len(pairs), decided=len(decided))
    return Plan(
        keys=keys,
        to_restore=counts["pairs"],
        finished=int(np.count_nonzero(finished)),
        decided=counts["decided"],
        recipe=recipe,
        source=inputs.source.url(),
        reference=inputs.reference.url() if inputs.reference else None,
        place=place,
        parts=tuple(parts),
        earlier=earlier,
    )


def selected(job: RestoreJob) -> pa.ChunkedArray:
    """The keys of all inputs that the job selects, as `Plan.keys` has them."""
    return _open(job).rows["key"]


def remaining(plan: Plan, output: Store) -> Plan:
    """What is left of a plan that was begun: the pairs for which there is no row yet in the report."""
    fresh = [name for name in part_names(output) if name not in plan.earlier]
    rows = [part["key"].combine_chunks() for part in read_parts(output, ("key",), names=fresh, recipe=plan.recipe)]
    there = pa.chunked_array(rows, pa.string())
    return plan.narrowed(lambda keys: pc.invert(pc.is_in(keys, value_set=there)))


def left_behind(plan: Plan, images: pa.ChunkedArray) -> int:
    """How many of these images (URLs) the plan will not write."""
    written = pa.chunked_array([pairs["output"].combine_chunks() for pairs in plan.tables()], pa.string())
    return len(images) - int(pc.sum(pc.is_in(images, value_set=written)).as_py() or 0)


@dataclass(frozen=True, slots=True)
class _Inputs:
    """What a job selects.

    `rows` has the columns of `LISTED`, and with a reference `partner`, the key there, which is null for none. A
    fingerprint is that of the source and its partner.
    """

    source: Collection
    reference: Collection | None
    rows: pa.Table


def _open(job: RestoreJob) -> _Inputs:
    """List the source and the reference, choose and pair."""
    if is_listing(job.source):
        listing = read_listing(job.source)
        source, reference = open_collection(listing.source), listing.reference and open_collection(listing.reference)
        rows = _select([listing.rows], job, source)
    else:
        source, reference = open_collection(job.source), job.reference and open_collection(job.reference)
        if job.reference == job.source:
            there = listed(source.list())  # once
            rows = _select([there], job, source)
        else:
            rows = _select(tables(source.list()), job, source)
            there = listed(reference.list()) if reference else LISTED.empty_table()
        if reference:
            found = there.select(["key", "fingerprint"]).rename_columns(["partner", "partner_fingerprint"])
            found = found.combine_chunks().take(partner_places(rows["key"], there["key"], job.pair))
            for name in found.column_names:
                rows = rows.append_column(name, found[name])
    if not reference:
        return _Inputs(source, None, rows)
    both = pc.binary_join_element_wise(rows["fingerprint"], rows["partner_fingerprint"], "|")
    both = pc.coalesce(both, rows["fingerprint"])
    rows = rows.drop_columns(["fingerprint", "partner_fingerprint"]).append_column("fingerprint", both)
    return _Inputs(source, reference, rows)


def _select(listing: Iterable[pa.Table], job: RestoreJob, source: Collection) -> pa.Table:
    """The rows whose keys the globs choose: they match the whole key or its last part, in upper or lower case."""
    chosen, count = list[pa.Table](), 0
    for rows in listing:
        keys = rows["key"].to_pylist()
        fits = [matches(key, job.include) and not matches(key, job.exclude) for key in keys]
        room = None if job.limit is None else job.limit - count
        chosen.append(rows.filter(pa.array(fits, pa.bool_())).slice(0, room))
        count += len(chosen[-1])
        if count == job.limit:
            break
    if not count:
        raise StorageError(
            f"no file below {source.url()} matches {', '.join(job.include)}"
            + (f" without {', '.join(job.exclude)}" if job.exclude else "")
            + ": check the folder and --include"
        )
    return pa.concat_tables(chosen)


def written_as(keys: pa.ChunkedArray, image_format: str) -> pa.ChunkedArray:
    """The keys of restored images below `images/`: their sources', ending as the format they are written in does."""
    if image_format == "same":
        return keys
    stems = pc.replace_substring_regex(keys, r"(?s)^((?:.*/)?[^/]+)\.[^/.]*$", r"\1")
    return pc.binary_join_element_wise(stems, extension(image_format.upper()), "")


def _finished(output: Store, inputs: _Inputs, recipe: str, protocol: str, *, restored_only: bool) -> tuple[Mask, Mask]:
    """Which inputs need nothing more, and which of those have an image. The latest row of a key counts, of whatever
    recipe: a later run under another one has replaced the image."""
    keys, prints = inputs.rows["key"], inputs.rows["fingerprint"]
    parts = []
    for part in read_parts(output, ("key", "fingerprint", "status", "protocol", "recipe", "finished_at")):
        right = pc.and_(pc.equal(part["recipe"], recipe), pc.fill_null(pc.equal(part["protocol"], protocol), True))
        if restored_only:
            right = pc.and_(right, pc.equal(part["status"], Status.RESTORED))
        columns = {"right": right, "image": pc.is_in(part["status"], value_set=pa.array(WRITTEN))}
        parts.append(pa.table(columns | {name: part[name] for name in ("key", "fingerprint", "finished_at")}))
    finished, written = np.zeros(len(keys), np.bool_), np.zeros(len(keys), np.bool_)
    if not parts:
        return finished, written
    rows = pa.concat_tables(parts)
    right, image = (rows[name].to_numpy() for name in ("right", "image"))
    at = pc.fill_null(pc.index_in(rows["key"], value_set=keys), -1).to_numpy()
    order = np.lexsort((rows["finished_at"].cast(pa.int64()).to_numpy(), at))
    latest = order[np.append(at[order][1:] != at[order][:-1], True)]
    latest = latest[(at[latest] >= 0) & right[latest]]
    row = np.full(len(keys), -1)
    row[at[latest]] = latest
    theirs = rows["fingerprint"].combine_chunks()
    for start in range(0, len(keys), ROWS):  # a copy of all fingerprints would be the largest thing here
        found = start + np.flatnonzero(row[start : start + ROWS] >= 0)
        same = pc.equal(prints.slice(start, ROWS).take(found - start), theirs.take(row[found])).to_numpy()
        finished[found[same]] = True
    written[finished] = image[row[finished]]
    return finished, written


def _owners(keys: pa.ChunkedArray, written: Mask, image_format: str) -> pa.ChunkedArray:
    """Whose result each key's name below `images/` stands for: a key.

    A result that is there keeps its name: that of another source must not replace it. Else the first one has it.
    """
    names = written_as(keys, image_format).combine_chunks().dictionary_encode()
    codes = names.indices.to_numpy()
    owner = np.empty(len(names.dictionary), np.int64)
    owner[codes[::-1]] = np.arange(len(codes))[::-1]
    owner[codes[written]] = np.flatnonzero(written)
    return pa.chunked_array([keys.combine_chunks().take(owner[codes])])


def _ends(rows: pa.Table, owner: pa.ChunkedArray | None, inputs: _Inputs, output: Store, job: RestoreJob) -> pa.Table:
    """The columns of `MANIFEST_SCHEMA`; and `status` and `reason` of what cannot be restored, null for the rest."""
    key, name = rows["key"], written_as(rows["key"], job.format)
    reason = rows["unsafe"]
    if owner is not None:
        clash = ("its result would be ", name, ", which is that of ", owner, ": rename one of them")
        reason = pc.if_else(pc.not_equal(owner, key), pc.binary_join_element_wise(*clash, ""), reason)
    status = pc.if_else(pc.is_valid(reason), Status.REFUSED, None)
    reference = pa.nulls(len(rows), pa.string())
    if inputs.reference:
        rule = f" under the rule {job.pair}" if job.pair else ""
        where = f" (or its name with another extension) in {inputs.reference.url()}{rule}"
        reference = pc.binary_join_element_wise(_base(inputs.reference), rows["partner"], "")
        lonely = pc.and_(pc.is_null(reference), pc.is_null(reason))
        missing = pc.binary_join_element_wise("no reference: looked for ", key, where, "")
        reason = pc.if_else(lonely, missing, reason)
        status = pc.if_else(lonely, Status.MISSING, status)
    columns = {
        "key": key,
        "source": pc.binary_join_element_wise(_base(inputs.source), key, ""),
        "reference": reference,
        "output": pc.binary_join_element_wise(output.url("images/-").removesuffix("-"), name, ""),
        "size": rows["size"],
        "fingerprint": rows["fingerprint"],
        "status": status,
        "reason": reason,
    }
    return pa.table(columns)


def _base(collection: Collection) -> str:
    """What stands before a key in its URL."""
    return collection.url("-").removesuffix("-")


def _report(decided: pa.Table, recipe: str, source: str) -> pa.Table:
    """Rows (`REPORT_SCHEMA`) of inputs that are not opened."""
    missing = pc.equal(decided["status"], Status.MISSING)
    known: dict[str, Any] = {name: decided[name] for name in ("key", "status", "reason", "size", "fingerprint")}
    known["source"] = pc.if_else(missing, decided["source"], source)  # a refused key has no URL
    known["recipe"] = pa.repeat(recipe, len(decided))
    known["finished_at"] = pa.repeat(pa.scalar(datetime.now(UTC), pa.timestamp("us", tz="UTC")), len(decided))
    columns = [known.get(field.name, pa.nulls(len(decided), field.type)) for field in REPORT_SCHEMA]
    return pa.table(columns, REPORT_SCHEMA.names).cast(REPORT_SCHEMA)
