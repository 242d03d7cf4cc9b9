"""What a job on a remote cluster runs: the pairs of a plan, read from the output, restored, their rows written there.

Whoever submits the job (`pipelines.remote`) has planned it and holds the output's lease, and reads the rows as they
appear. Nothing else passes between the two: the job's command line holds only where its order lies.
"""

import json
import logging
import signal
import sys
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

import nafnet
from pipelines import engine
from pipelines.lease import Follower, LeaseHeld, LeaseLost
from pipelines.parts import PartWriter, read_parquet
from pipelines.prepare import settle_job
from pipelines.retry import GaveUp
from pipelines.settings import RestoreJob
from pipelines.storage import StorageError, Store, use
from pipelines.storage_options import load
from pipelines.weights import adopt_prefix

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Order:
    """What is to be done. Kept as JSON below `manifest/`, without secrets: a job has none.

    Attributes:
        job: fields of `RestoreJob`.
        version: of this package where the order was made.
        recipe: hash of the recipe that the pairs were planned under.
        source, reference: the collections that the pairs' keys and references lie in.
        place, parts: where the manifest's parts are.
        lease: id of the output's lease, which the job goes by.
        weights_from: as in `Work`.
    """

    job: dict[str, Any]
    version: str
    recipe: str
    source: str
    reference: str | None
    place: str
    parts: tuple[str, ...]
    lease: str
    weights_from: str | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a job ended: what cluster did it, or what it met. `passing`: an error that may be gone next time."""

    cluster: dict[str, Any] | None = None
    error: str | None = None
    passing: bool = False


def is_passing(error: Exception) -> bool:
    """Whether another attempt may not meet it: a cluster or a storage that failed, not a job that is wrong."""
    if isinstance(error, StorageError):  # no bucket or no permission stays so; what was tried again may pass
        return isinstance(error.__cause__, GaveUp) and not isinstance(error, (LeaseLost, LeaseHeld))
    return isinstance(error, (*engine.PASSING, GaveUp))


def outcome_key(order_key: str) -> str:
    """Where the outcome of an order is written."""
    return order_key.removesuffix(".json") + "-outcome.json"


def main() -> None:
    """`OUTPUT ORDER [STORAGE]`: the output's URL, the order's key there, and the name of its storage options.

    Ends with 1 when the job did not come to its end, and writes why to the output.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logger.info("nafnet-pipelines %s from %s", nafnet.__version__, nafnet.__file__)
    url, key, *storage = sys.argv[1:]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # rows that wait are written on the way out
    use(load(storage[0] if storage else None))
    output = Store(url)
    outcome = _follow(output, Order(**json.loads(output.read(key))))
    output.write(outcome_key(key), json.dumps(asdict(outcome)).encode())
    if outcome.error:
        sys.exit(outcome.error)


def _follow(output: Store, order: Order) -> Outcome:
    try:
        return Outcome(cluster=_run(output, order))
    except Exception as error:
        logger.exception("the job was broken off")
        return Outcome(error=f"{type(error).__name__}: {error}", passing=is_passing(error))


def _run(output: Store, order: Order) -> dict[str, Any]:
    if order.version != nafnet.__version__:
        raise ValueError(
            f"the cluster has nafnet-pipelines {nafnet.__version__}, the job was planned by {order.version}: "
            "install the same there, or give the wheel with the job (ray_wheel)"
        )
    adopt_prefix(order.weights_from)
    prepared = settle_job(RestoreJob(**{**order.job, "ray_address": "auto", "ray_wheel": None}))
    if prepared.recipe.hash != order.recipe:
        raise ValueError(
            f"the cluster comes to recipe {prepared.recipe.hash} where the job was planned as {order.recipe}: "
            "is the checkpoint another file there?"
        )
    place, lease = Store(order.place), Follower(output, order.lease)
    pairs = (read_parquet(place, part) for part in order.parts)
    with PartWriter(output) as parts:

        def on_rows(rows: pa.Table) -> None:
            lease.check()
            parts.add(rows)
            logger.info("%d rows", len(rows))

        return engine.run(pairs, prepared.work(order.source, order.reference), prepared.placement, on_rows)
