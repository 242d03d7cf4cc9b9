"""What there is to do: list the source once, pair it, drop what an earlier run finished, write manifest parts."""

import uuid
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

import pyarrow as pa

from nafnet.images import extension
from pipelines.containers import Collection, open_collection
from pipelines.datasets import Partners, matches, partners
from pipelines.listing import is_listing, read_listing
from pipelines.parts import write_parquet
from pipelines.records import MANIFEST_SCHEMA, REPORT_SCHEMA, Pair, ReportRow, Status
from pipelines.report import read_rows
from pipelines.settings import RestoreJob
from pipelines.storage import Entry, StorageError, Store, UnsafeKey, check_key, readable

_PART_ROWS = 100_000
_WRITTEN = {Status.RESTORED, Status.SUSPECT}  # ends that left an image


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run will do.

    Attributes:
        pairs: what is to be restored, in `MANIFEST_SCHEMA`, sorted by key.
        decided: rows of the inputs whose end is known without opening them (`REPORT_SCHEMA`).
        keys: of all inputs that the job selects; `finished` of them need nothing more.
        recipe: hash of the recipe that the pairs are to be restored under.
        source, reference: the collections that the pairs' keys and references lie in.
    """

    pairs: pa.Table
    decided: pa.Table
    keys: pa.Array
    finished: int
    recipe: str
    source: str
    reference: str | None

    @property
    def matched(self) -> int:
        """How many inputs the job selects."""
        return len(self.keys)


def plan(job: RestoreJob, recipe: str, protocol: str) -> Plan:
    """Decide what is to be done for `job` under the recipe of this hash, scored under `protocol` (a convention's name).

    An input is finished when the report has its row for the same content (source and reference), recipe and
    protocol; with `job.retry_failed` only if that row says `restored`.

    Raises:
        StorageError: a location cannot be listed, or nothing in the source matches.
    """
    output = Store(job.output)
    source, listed, reference, find = _open(job)
    entries = list(_select(listed, job))
    if not entries:
        raise StorageError(
            f"no file below {source.url()} matches {', '.join(job.include)}"
            + (f" without {', '.join(job.exclude)}" if job.exclude else "")
            + ": check the folder and --include"
        )
    finished = _finished(output, recipe, protocol, restored_only=job.retry_failed)
    pairs, decided, skipped = list[Pair](), list[ReportRow](), 0
    partners = [find(entry.key) if find else None for entry in entries]
    fingerprints = [
        f"{entry.fingerprint}|{partner.fingerprint}" if partner else entry.fingerprint
        for entry, partner in zip(entries, partners, strict=True)
    ]
    names = [written_as(entry.key, job.format) for entry in entries]
    ends = [finished.get((readable(entry.key), found)) for entry, found in zip(entries, fingerprints, strict=True)]
    # A result that is there keeps its name: that of another source must not replace it.
    owners = {name: entry.key for name, entry, end in zip(names, entries, ends, strict=True) if end in _WRITTEN}
    for entry, partner, fingerprint, name, end in zip(entries, partners, fingerprints, names, ends, strict=True):
        owner = owners.setdefault(name, entry.key)
        if end is not None:
            skipped += 1
            continue
        if owner != entry.key:
            reason = f"its result would be {readable(name)}, which is that of {readable(owner)}: rename one of them"
            decided.append(_decide(entry, fingerprint, recipe, Status.REFUSED, reason, source.url()))
            continue
        try:
            check_key(entry.key)
            pair = Pair(
                key=entry.key,
                source=source.url(entry.key),
                reference=reference.url(partner.key) if reference and partner else None,
                output=output.url(f"images/{name}"),
                size=entry.size,
                fingerprint=fingerprint,
            )
        except UnsafeKey as error:
            decided.append(_decide(entry, fingerprint, recipe, Status.REFUSED, str(error), source.url()))
            continue
        if reference and not partner:
            rule = f" under the rule {job.pair}" if job.pair else ""
            where = f"{reference.url()}{rule}"
            reason = f"no reference: looked for {entry.key} (or its name with another extension) in {where}"
            decided.append(_decide(entry, fingerprint, recipe, Status.MISSING, reason, pair.source))
            continue
        pairs.append(pair)
    return Plan(
        pairs=pa.Table.from_pylist([asdict(pair) for pair in pairs], schema=MANIFEST_SCHEMA),
        decided=pa.Table.from_pylist([asdict(row) for row in decided], schema=REPORT_SCHEMA),
        keys=pa.array([readable(entry.key) for entry in entries], pa.string()),
        finished=skipped,
        recipe=recipe,
        source=source.url(),
        reference=reference.url() if reference else None,
    )


def _open(job: RestoreJob) -> tuple[Collection, Iterable[Entry], Collection | None, Partners | None]:
    """The source with its entries, and the reference with the way to find an entry's partner in it."""
    if is_listing(job.source):
        listing = read_listing(job.source)
        reference = listing.reference and open_collection(listing.reference)
        return open_collection(listing.source), listing.entries, reference or None, listing.partner
    source = open_collection(job.source)
    if job.reference is None:
        return source, source.list(), None, None
    reference = open_collection(job.reference)
    if job.reference == job.source:  # listed once
        entries = list(source.list())
        return source, entries, reference, partners(entries, job.pair)
    return source, source.list(), reference, partners(reference.list(), job.pair)


def written_as(key: str, image_format: str) -> str:
    """The key of a restored image below `images/`: its source's, ending as the format it is written in does."""
    if image_format == "same":
        return key
    folder, slash, name = key.rpartition("/")
    stem = name.rpartition(".")[0] or name
    return f"{folder}{slash}{stem}{extension(image_format.upper())}"


def write_parts(plan: Plan, output: Store) -> None:
    """Write the plan's pairs below `manifest/`, so that a person can see what a run set out to do."""
    run = uuid.uuid4().hex[:12]
    for i, start in enumerate(range(0, len(plan.pairs), _PART_ROWS)):
        write_parquet(output, f"manifest/{run}-{i:05d}.parquet", plan.pairs.slice(start, _PART_ROWS))


def _select(entries: Iterable[Entry], job: RestoreJob) -> Iterator[Entry]:
    """Globs match the whole key or its last part, without regard to upper and lower case."""
    chosen = 0
    for entry in entries:
        if chosen == job.limit:
            return
        if matches(entry.key, job.include) and not matches(entry.key, job.exclude):
            chosen += 1
            yield entry


def _finished(output: Store, recipe: str, protocol: str, *, restored_only: bool) -> dict[tuple[str, str], str]:
    """(key, fingerprint) of what needs nothing more, with its status. The latest row of a key counts, of whatever
    recipe: a later run under another one has replaced the image."""
    rows = read_rows(output).select(["key", "fingerprint", "status", "protocol", "recipe"])
    return {
        (key, fingerprint): status
        for key, fingerprint, status, scored_by, made_by in zip(*(c.to_pylist() for c in rows.columns), strict=True)
        if made_by == recipe and (status == Status.RESTORED or not restored_only) and scored_by in {None, protocol}
    }


def _decide(entry: Entry, fingerprint: str, recipe: str, status: Status, reason: str, source: str) -> ReportRow:
    return ReportRow(
        key=readable(entry.key),
        status=status,
        reason=reason,
        recipe=recipe,
        source=source,
        size=entry.size,
        fingerprint=fingerprint,
        finished_at=datetime.now(UTC),
    )
