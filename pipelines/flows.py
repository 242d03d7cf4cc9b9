"""The jobs as Prefect flows: Prefect schedules, watches, cancels and shows runs; Ray schedules the images."""

import inspect
import json
import logging
import math
import platform
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Annotated, Any, Literal, TypeVar, cast
from uuid import UUID

import pyarrow as pa
import pyarrow.compute as pc
from prefect import flow, task
from prefect.artifacts import create_markdown_artifact
from prefect.blocks.system import Secret
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.client.schemas import FlowRun, State
from prefect.exceptions import ObjectNotFound
from prefect.runtime import deployment, flow_run, task_run
from prefect.settings import get_current_settings
from prefect.states import Completed, Failed
from prefect.tasks import exponential_backoff

from nafnet.ablations import ABLATIONS
from nafnet.conventions import Convention, ProfileName, ProtocolName
from nafnet.recipe import Precision
from pipelines import benchmark as benchmarks
from pipelines import compare as comparing
from pipelines import (
    compare_html,
    datasets,
    engine,
    lease,
    manifest,
    remote,
    report,
    report_html,
    report_sheet,
    retry,
)
from pipelines.artifacts import Watch, emit, log_to_prefect, show_history, show_page, show_summary, unimportant
from pipelines.benchmark import Cause, Published, Trial, Verdict
from pipelines.containers import open_collection
from pipelines.datasets import IMAGES, DataName, Found
from pipelines.driver import Order, is_passing
from pipelines.lease import Lease
from pipelines.listing import is_listing
from pipelines.machine import describe_machine
from pipelines.manifest import Plan
from pipelines.parts import PartWriter, set_aside
from pipelines.prepare import Prepared, settle_job
from pipelines.progress import Progress
from pipelines.records import Status
from pipelines.remote import Owner
from pipelines.settings import RestoreJob, StorageName, TileName
from pipelines.storage import Store, use
from pipelines.storage_options import StorageOptions, load
from pipelines.weights import own_prefix

logger = logging.getLogger(__name__)

NOT_REPRODUCED = "NotReproduced"  # the name of a benchmark's failed state when it ran to its end
DIFFERENT = "Different"  # the name of a comparison's failed state when it ran to its end
INCOMPLETE = "Incomplete"  # the name of a run's failed state when it did its work but not every image was restored


def prepare(job: RestoreJob) -> Prepared:
    """Put the storage options in force and settle the job: see `pipelines.prepare`."""
    use(load_options(job.storage))
    return settle_job(job)


def load_options(name: str | None) -> StorageOptions:
    """Options of file systems, from the place of this name; `block:NAME` is a Prefect Secret that holds the table.

    Raises:
        ValueError: nothing is there, or no such table.
    """
    if name is None or not name.startswith("block:"):
        return load(name)
    try:
        secret = cast("Secret[Any]", Secret.load(name.removeprefix("block:")))  # a coroutine only when called from one
    except ValueError as error:
        raise ValueError(f"storage {name}: Prefect has no Secret block of this name: make it there") from error
    return StorageOptions.parse(name, secret.get())


def reach_server() -> str | None:
    """The API of the Prefect server that is set, and its version, once it has answered; None when none is set.

    Raises:
        Exception: it does not answer.
    """
    url = get_current_settings().api.url
    if url is None:
        return None
    with get_client(sync_client=True) as client:
        client.hello().raise_for_status()
        return f"{url}, version {client.api_version()}"


_F = TypeVar("_F", bound=Callable[..., Any])


def _described(function: _F) -> _F:
    """A flow's function whose parameters of `RestoreJob`'s names have that model's bounds and descriptions.

    A server refuses what is out of bounds before there is a run, and its forms show the descriptions.
    """
    fields, signature = RestoreJob.model_fields, inspect.signature(function)
    bounds = {name: field.metadata for name, field in fields.items() if field.metadata}
    parameters = [
        one.replace(annotation=Annotated[(one.annotation, *bounds[one.name])]) if one.name in bounds else one
        for one in signature.parameters.values()
    ]
    said = {name: fields[name].description for name in signature.parameters if name in fields}
    own = inspect.getdoc(function) or ""
    words = [f"    {name}: {text}" for name, text in said.items() if text]
    function.__doc__ = "\n".join([own if "\nArgs:\n" in own else f"{own}\n\nArgs:", *words])
    function.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return function


def stop_job(flow: Any, flow_run: FlowRun, state: State[Any]) -> None:  # noqa: ARG001 - what a hook is called with
    """Stop what a run has on a cluster when its own process cannot: a hook, which the worker calls."""
    address = str(flow_run.parameters.get("ray_address", ""))
    if remote.is_remote(address):
        remote.stop(address, str(flow_run.id))


@flow(name="restore", log_prints=False, on_cancellation=[stop_job], on_crashed=[stop_job])
@_described
def restore(
    source: str,
    output: str,
    reference: str | None = None,
    pair: str | None = None,
    checkpoint: str | tuple[str, ...] = "demo",
    tlc: bool | None = None,
    train_size: int | None = None,
    protocol: ProtocolName | None = None,
    metrics: ProfileName = "authors",
    crop_border: int = 0,
    y_channel: bool = False,
    precision: Precision = "float32",
    tile: TileName = "auto",
    halo: int = 192,
    strength: float = 1,
    self_ensemble: bool = False,
    guard: bool = True,
    deterministic: bool = False,
    format: Literal["same", "png", "jpeg", "tiff", "webp", "bmp"] = "same",  # noqa: A002 - as people name it
    quality: int | None = None,
    subsampling: Literal["4:4:4", "4:2:2", "4:2:0"] | None = None,
    actors: int | None = None,
    max_actors: int | None = None,
    gpus_per_actor: float = 0,
    ray_address: str = "local",
    ray_wheel: str | None = None,
    time_limit: float | None = None,
    include: tuple[str, ...] = IMAGES,
    exclude: tuple[str, ...] = (),
    limit: int | None = None,
    max_failed: int = 0,
    retry_failed: bool = False,
    fresh: bool = False,
    max_megapixels: float = 250,
    storage: StorageName | None = None,
) -> State[Any]:
    """Restore a collection of images, score it where references exist, and write a report.

    Every image ends as one row of the report. The run ends red when more than `max_failed` of them were not restored,
    after all others were. Parameters are those of `pipelines.settings.RestoreJob`, flat, so that a deployment's values
    can be overridden one by one.
    """
    job = RestoreJob.model_validate(dict(locals()))
    log_to_prefect()
    prepared = prepare(job)
    started, clock = datetime.now(UTC), time.monotonic()
    with lease.hold(Store(job.output), f"flow run {flow_run.name}") as held:
        plan = plan_images(prepared)
        emit("started", matched=plan.matched, to_restore=plan.to_restore, output=job.output)
        deadline = math.inf if job.time_limit is None else clock + job.time_limit * 3600
        cluster = restore_images(prepared, plan, held, deadline)
        held.check()
        run = _describe_run(prepared, plan, cluster, started)
        summary = report_images(prepared, plan, run, time.monotonic() - clock)
    emit("completed", images=summary["images"], counts=summary["counts"], psnr=summary["psnr"], gain=summary["gain"])
    with unimportant():
        show_history(summary)
    if summary["images"] != plan.matched:
        raise RuntimeError(f"{plan.matched} images match, but the report has rows of {summary['images']}: run again")
    failed = summary["images"] - summary["counts"][Status.RESTORED]
    if failed > job.max_failed:
        tolerated = f" (tolerated: {job.max_failed} not restored)"
        return Failed(name=INCOMPLETE, message=report.count_line(summary) + tolerated)
    return Completed(message=report.count_line(summary))


def _passing(_task: Any, _run: Any, state: State[Any]) -> bool:
    """Whether a deployment's run tries again: for what may be gone by then. A person at a terminal sees it at once."""
    error = state.result(raise_on_failure=False)
    return bool(deployment.id) and isinstance(error, Exception) and is_passing(error)


_AGAIN: dict[str, Any] = {
    "retries": 3,
    "retry_delay_seconds": exponential_backoff(10),
    "retry_jitter_factor": 0.2,
    "retry_condition_fn": _passing,
}


@task(name="plan", cache_policy=NO_CACHE, **_AGAIN)
def plan_images(prepared: Prepared) -> Plan:
    """List, pair, drop what is finished; write the manifest and the rows of inputs that are decided already.

    Before that, what dead runs left on a cluster is stopped: it would go on writing.
    """
    job = prepared.job
    _stop_orphans(job)
    earlier = set_aside(Store(job.output)) if job.fresh else None
    plan = manifest.plan(job, prepared.recipe.hash, prepared.protocol)
    source = open_collection(plan.source)
    if plan.to_restore and isinstance(source, Store) and not source.is_local:
        keys = next(plan.tables())["key"]
        some = range(0, len(keys), max(1, len(keys) // 3))  # a single one may be an exception
        source.check_readable([keys[i].as_py() for i in some])
    logger.info(
        "%d images match: %d to restore, %d finished in an earlier run, %d that cannot be",
        plan.matched,
        plan.to_restore,
        plan.finished,
        plan.decided,
    )
    if earlier is not None:
        left = manifest.left_behind(plan, earlier)
        counted = report.counted(left, "image")
        logger.info("starting anew: earlier rows are moved to report-before/; left as they are: %s", counted)
    return plan


@task(name="restore", cache_policy=NO_CACHE, **_AGAIN)
def restore_images(prepared: Prepared, plan: Plan, held: Lease, deadline: float) -> dict[str, Any]:
    """Restore what the plan holds and write report parts as rows come in. Says what cluster did it.

    At the deadline (`time.monotonic`) it ends with `engine.TimeLimit`.
    Another attempt of the same run does what is left.
    """
    if task_run.run_count > 1:
        _stop_orphans(prepared.job)
        plan = manifest.remaining(plan, Store(prepared.job.output))
    if not plan.to_restore:
        logger.info("nothing to do: every image is finished under recipe %s", plan.recipe)
        return {}
    with Progress(plan.to_restore) as progress:
        watch = Watch(progress)

        def on_rows(rows: pa.Table) -> None:
            held.check()
            progress.add(Counter(rows["status"].to_pylist()))
            watch.add(rows)

        return _follow(prepared, plan, held, on_rows, deadline)


def _follow(
    prepared: Prepared, plan: Plan, held: Lease, on_rows: Callable[[pa.Table], None], deadline: float = math.inf
) -> dict[str, Any]:
    """Restore a plan where its job says, and have the rows in the output before `on_rows` gets them."""
    job, output = prepared.job, Store(prepared.job.output)
    if not remote.is_remote(job.ray_address):
        verbose = logger.isEnabledFor(logging.DEBUG)
        work = prepared.work(plan.source, plan.reference)
        with PartWriter(output) as parts:

            def keep(rows: pa.Table) -> None:
                held.check()
                parts.add(rows)
                on_rows(rows)

            return engine.run(plan.tables(), work, prepared.placement, keep, deadline=deadline, verbose=verbose)
    order = Order(
        job={**job.model_dump(mode="json"), "checkpoint": prepared.weights},  # paths as they are here
        version=version("nafnet-pipelines"),
        recipe=plan.recipe,
        source=plan.source,
        reference=plan.reference,
        place=plan.place.url(),
        parts=plan.parts,
        lease=held.id,
        weights_from=own_prefix(),
    )
    owner = Owner(flow_run=str(flow_run.root_flow_run_id), api=get_current_settings().api.url or "")
    return remote.run(
        job.ray_address,
        order,
        owner,
        on_rows,
        deadline=deadline,
        storage=job.storage,
        wheel=job.ray_wheel,
    )


def _stop_orphans(job: RestoreJob) -> None:
    """Those that dead runs left on a cluster. The output's lease is held."""
    if remote.is_remote(job.ray_address):
        remote.reap(job.ray_address, Store(job.output).url(), _is_over)


def _is_over(owner: Owner) -> bool:
    """Whether a flow run has ended. One that this server does not know may be another's at the same address."""
    url = get_current_settings().api.url
    if url is None or owner.api != url:
        return False
    with get_client(sync_client=True) as client:
        try:
            state = client.read_flow_run(UUID(owner.flow_run)).state
        except ObjectNotFound:
            return False
    return state is not None and state.is_final()


@task(name="report", cache_policy=NO_CACHE)
def report_images(prepared: Prepared, plan: Plan, run: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Summarise the rows of the job's inputs; write summary.json, run.json and report.html; show them in Prefect."""
    output = Store(prepared.job.output)
    rows = report.read_rows(output, report.SHOWN, recipe=plan.recipe)
    rows = rows.filter(pc.is_in(rows["key"], value_set=plan.keys))  # others may be there, of a wider job
    made = plan.to_restore + plan.decided
    summary = report.summarize(rows, recipe=prepared.recipe, wall_seconds=seconds if made else None, wall_images=made)
    if made or not output.exists("run.json"):  # a run that found nothing to do leaves the record of the one that did
        output.write("run.json", json.dumps(run, indent=2).encode())
    else:
        run = json.loads(output.read("run.json"))
    report.write_summary(output, summary)
    whole = report.read_rows(output, recipe=plan.recipe, keys=report_sheet.telling(rows))
    strips = report_sheet.load_strips(whole)
    page = report_html.write_report(output, rows, summary, run, strips=strips)
    with unimportant():
        show_summary(summary, page, strips)
    return summary


@flow(name="benchmark", log_prints=False, on_cancellation=[stop_job], on_crashed=[stop_job])
@_described
def benchmark(
    data: DataName,
    url: str,
    output: str,
    checkpoint: str | None = None,
    against: str | None = None,
    expect_psnr: float | None = None,
    expect_ssim_3d: float | None = None,
    images: int | None = None,
    variant: Literal["gamma"] | None = None,
    reference: str | None = None,
    pair: str | None = None,
    include: tuple[str, ...] | None = None,
    explain: bool = True,
    tlc: bool | None = None,
    train_size: int | None = None,
    protocol: ProtocolName | None = None,
    metrics: ProfileName = "authors",
    precision: Precision = "float32",
    tile: TileName = "whole",
    halo: int = 192,
    actors: int | None = None,
    max_actors: int | None = None,
    gpus_per_actor: float = 0,
    ray_address: str = "local",
    ray_wheel: str | None = None,
    time_limit: float | None = None,
    storage: StorageName | None = None,
) -> State[Any]:
    """Restore a published test set, score it as its authors do, and compare the means with the published ones.

    Ends red when the value is not reproduced.

    Args:
        data: The test set
        url: The test set as it is distributed (a folder or a prefix), a list of pairs, or with reference any images
        against: The catalog or ablation row whose published value is to be met; unset: the checkpoint's own
        expect_psnr: The mean PSNR to meet instead, dB
        expect_ssim_3d: The mean SSIM-3D to meet instead
        images: How many images there should be; unset: the published number
        variant: gamma: GoPro's blur_gamma, which is not the published one
        reference: Where the sharp originals lie, for a test set that lies in a way of its own
        pair: How references are named then, OLD=NEW
        include: Which images of it are scored then; globs
        explain: When the value is not met, look for the cause on a sample
    """
    given = dict(locals())
    found, goal, job = benchmark_job(given)
    state: State[Any] = restore(**job.model_dump(), return_state=True)
    if not state.is_completed() and state.name != INCOMPLETE:
        state.result()  # raises what ended it
    verdict = judge_run(job, found, goal, explain=explain)
    text = "\n".join(benchmarks.lines(verdict))
    with unimportant():
        create_markdown_artifact(f"```\n{text}\n```", key="verdict", description="Against the published value")
    if verdict.reproduced:
        return Completed(message=f"reproduced: {goal.name}")
    return Failed(name=NOT_REPRODUCED, message=f"not reproduced: {goal.name}: {'; '.join(verdict.problems)}")


def benchmark_job(given: dict[str, Any]) -> tuple[Found, Published, RestoreJob]:
    """The data set, the value to meet and the restoration job of a benchmark's parameters.

    Raises:
        StorageError, ValueError: there is no such data set at the URL, or no value to meet; or a parameter is wrong.
    """
    data = given["data"]
    use(load_options(given["storage"]))
    found = _test_set(given)
    checkpoint = given["checkpoint"] or benchmarks.default_checkpoint(data)
    job = RestoreJob(
        source=found.source,
        reference=found.reference,
        include=found.include,
        pair=found.pair,
        checkpoint=(checkpoint,),
        output=given["output"],
        protocol=given["protocol"] or data,
        **{name: given[name] for name in _BENCHMARK_FIELDS},
    )
    if given["expect_psnr"] is not None:
        goal = Published("the value given", given["expect_psnr"], given["expect_ssim_3d"], given["images"])
    else:
        name = given["against"] or checkpoint
        goal = benchmarks.published(name, data)
        goal = replace(goal, images=given["images"] or goal.images)
        if name in ABLATIONS:
            benchmarks.check_row(name, data, checkpoint)
    return found, goal, job


def _test_set(given: dict[str, Any]) -> Found:
    """The test set as it is distributed, or as the parameters say that it lies. Raises as `benchmark_job` does."""
    data, url, own = given["data"], given["url"], {name: given[name] for name in ("reference", "pair", "include")}
    if not is_listing(url) and own["reference"] is None:
        if named := [name for name, value in own.items() if value is not None]:
            raise ValueError(f"{' and '.join(named)} without a reference: a set as it is distributed needs neither")
        return datasets.find(data, url, variant=given["variant"])
    if given["variant"] is not None:
        raise ValueError("a variant is one of a set as it is distributed: leave out the variant, or the reference")
    words = "a list of pairs" if is_listing(url) else "images and references as given"
    return Found(data, words, url, own["reference"], tuple(own["include"] or datasets.IMAGES), own["pair"])


_BENCHMARK_FIELDS = (
    *("tlc", "train_size", "metrics", "precision", "tile", "halo"),
    *("actors", "max_actors", "gpus_per_actor", "ray_address", "ray_wheel", "time_limit", "storage"),
)


@task(name="judge", cache_policy=NO_CACHE)
def judge_run(job: RestoreJob, found: Found, goal: Published, *, explain: bool) -> Verdict:
    """Read the rows of a finished run, compare them with the published value, and say why they differ."""
    prepared, output = prepare(job), Store(job.output)
    keys = manifest.selected(job)
    rows = report.read_rows(output, recipe=prepared.recipe.hash)
    rows = rows.filter(pc.is_in(rows["key"], value_set=keys))
    summary = report.summarize(rows, recipe=prepared.recipe)
    names = "+".join(job.checkpoint)
    verdict = benchmarks.judge(rows, summary, prepared.recipe, goal, data=found.data, checkpoint=names)
    if explain and not verdict.reproduced:
        verdict = _explained(prepared, keys.to_pylist(), rows, found, verdict)
    benchmarks.write_verdict(output, verdict)
    return verdict


def _explained(prepared: Prepared, keys: Sequence[str], rows: pa.Table, found: Found, verdict: Verdict) -> Verdict:
    """With the settings that, on a sample, make the difference that the run shows, and what else was tried."""
    if verdict.psnr_off is None or abs(verdict.psnr_off) <= verdict.tolerance.psnr:
        return verdict
    scores = dict(zip(rows["key"].to_pylist(), rows["psnr"].to_pylist(), strict=True))
    places = [at for at in benchmarks.sampled(keys) if scores.get(keys[at]) is not None]
    convention = Convention.parse(prepared.protocol)
    causes, tried, not_tried = list(verdict.causes), list[str](), list[str]()
    for trial in benchmarks.trials(prepared.recipe, convention, found.data, datasets.other_blur(found)):
        logger.info("trying on %d images whether %s", len(places), trial.words)
        try:
            moved = _moved(prepared.job, trial, places, [scores[keys[at]] for at in places])
        except Exception as error:
            logger.warning("%s could not be tried", trial.name, exc_info=True)
            not_tried.append(f"{trial.name}: {type(error).__name__}: {error}")
            continue
        tried.append(trial.name)
        if benchmarks.explains(verdict, moved):
            words = f"{trial.words}: on {len(places)} images the other way moves PSNR by {moved:+.3f} dB"
            causes.append(Cause(trial.name, words))
    return replace(verdict, causes=tuple(causes), tried=tuple(tried), not_tried=tuple(not_tried))


def _moved(job: RestoreJob, trial: Trial, places: Sequence[int], before: Sequence[float]) -> float | None:
    """By how much (dB) another setting moves the mean PSNR of the images at these places; None if it cannot be told."""
    place = Store(job.output).url(f"why/{trial.name}")
    other = job.model_copy(update={**trial.changes, "output": place, "fresh": True})
    prepared = prepare(other)
    made: list[pa.Table] = []
    with lease.hold(Store(other.output), f"flow run {flow_run.name}") as held:
        plan = manifest.plan(other, prepared.recipe.hash, prepared.protocol)
        keys = plan.keys.take(pa.array([at for at in places if at < len(plan.keys)], pa.int64()))
        some = plan.narrowed(lambda there: pc.is_in(there, value_set=keys))
        _follow(prepared, some, held, made.append)
    scores = {row["key"]: row["psnr"] for rows in made for row in rows.to_pylist()}
    after = [scores.get(key) for key in keys.to_pylist()]
    both = [
        (a, b) for a, b in zip(after, before, strict=True) if a is not None and math.isfinite(a) and math.isfinite(b)
    ]
    return sum(a - b for a, b in both) / len(both) if both else None


def _describe_run(prepared: Prepared, plan: Plan, cluster: dict[str, Any], started: datetime) -> dict[str, Any]:
    """What run.json holds: enough to make the run again and to compare it with another.

    `machine` and `versions` are the driver's; `ray` holds the kinds of machine that its cluster has (`machines`).
    """
    rows = report.read_rows(Store(prepared.job.output), ("key", "fingerprint"), recipe=plan.recipe)
    inputs = rows.filter(pc.is_in(rows["key"], value_set=plan.keys))
    packages = ("nafnet-pipelines", "torch", "ray", "prefect", "pyarrow", "numpy", "pillow", "imagecodecs")
    return {
        "recipe": {"hash": plan.recipe, **asdict(prepared.recipe)},
        "weights": {"checkpoint": prepared.job.checkpoint, "sha256": prepared.recipe.weights},
        "protocol": prepared.protocol,
        "job": prepared.job.model_dump(mode="json"),
        "plan": {"matched": plan.matched, "attempted": plan.to_restore, "finished_before": plan.finished},
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "inputs": {"images": len(inputs), "sha256": comparing.inputs_hash(inputs)},
        "machine": describe_machine(),
        "precision": comparing.precision_flags(prepared.recipe, cluster.get("threads")),
        "ray": cluster,
        "driver_storage_retries": retry.total(),
        "started_at": started.isoformat(timespec="seconds"),
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


@flow(name="compare", log_prints=False)
def compare(
    runs: tuple[str, ...], output: str, tolerance: float = comparing.TOLERANCE, storage: StorageName | None = None
) -> State[Any]:
    """Compare runs of `restore`, given by their outputs, with the first of them; write compare.html and compare.json.

    Ends red when one has another recipe than the first, lacks an image, ended one otherwise, or has an image whose
    PSNR is further than `tolerance` dB from that of the first.
    """
    use(load_options(storage))
    comparison = compare_runs(runs, output, tolerance)
    message = "\n".join(comparison.lines)
    return Completed(message=message) if comparison.alike else Failed(name=DIFFERENT, message=message)


@task(name="compare", cache_policy=NO_CACHE)
def compare_runs(runs: tuple[str, ...], output: str, tolerance: float) -> comparing.Comparison:
    """Read the runs, compare them, write the page and show the numbers in Prefect."""
    comparison = comparing.compare([comparing.load_run(run) for run in runs], tolerance)
    page = compare_html.write_comparison(Store(output), comparison)
    with unimportant():
        create_markdown_artifact(comparing.markdown(comparison), key="comparison", description="Runs side by side")
        show_page("compare", page)
    return comparison
