"""From a job as a person gave it to all that is settled before anything is listed: weights, recipe, convention."""

from dataclasses import dataclass

from nafnet import catalog
from nafnet import checkpoint as checkpoints
from nafnet.checkpoint import CheckpointError
from nafnet.conventions import Convention
from nafnet.recipe import Recipe
from nafnet.restore import Restorer, settle
from pipelines.engine import Placement
from pipelines.settings import RestoreJob
from pipelines.stages import Work
from pipelines.storage import in_force
from pipelines.weights import locate, own_prefix


@dataclass(frozen=True, slots=True)
class Prepared:
    """A job whose checkpoint was found and read.

    `protocol` is the name of the whole convention that scores are under (`nafnet.conventions.Convention`).
    """

    job: RestoreJob
    weights: tuple[str, ...]
    recipe: Recipe
    protocol: str

    def work(self, source: str, reference: str | None) -> Work:
        """What every stage needs to know, for pairs of these collections. Takes the storage options in force."""
        job = self.job
        return Work(
            source=source,
            reference=reference,
            output=job.output,
            weights=self.weights,
            recipe=self.recipe,
            protocol=self.protocol,
            device="cuda" if job.gpus_per_actor else "cpu",
            max_pixels=int(job.max_megapixels * 1e6),
            storage=in_force(),
            weights_from=own_prefix(),
        )

    @property
    def placement(self) -> Placement:
        """Where the job runs."""
        job = self.job
        return Placement(job.ray_address, job.actors, job.max_actors, job.gpus_per_actor)


def settle_job(job: RestoreJob) -> Prepared:
    """Find and check the weights, settle the recipe and the scoring convention. The storage options are in force.

    Raises:
        CheckpointError, StorageError, ValueError: the checkpoint or a parameter cannot be used.
    """
    paths = [locate(name) for name in job.checkpoint]
    named = [catalog.CATALOG.get(name) for name in job.checkpoint]
    loaded = [checkpoints.load(path) for path in paths]
    for entry, path, found in zip(named, paths, loaded, strict=True):
        if entry and entry.sha256 and entry.sha256 != found.sha256:
            raise CheckpointError(f"{path} is not the published {entry.name}: its SHA-256 is {found.sha256}")
    steps = tuple(
        settle(found, tlc=entry.tlc if entry and job.tlc is None else job.tlc, train_size=job.train_size)
        for entry, found in zip(named, loaded, strict=True)
    )
    recipe = Recipe(
        steps=steps,
        precision=job.precision,
        tile=job.tile,
        halo=job.halo,
        strength=job.strength,
        self_ensemble=job.self_ensemble,
        guard=job.guard,
        deterministic=job.deterministic,
        output=job.format if job.format == "same" else job.format.upper(),
        quality=job.quality,
        subsampling=job.subsampling,
    )
    Restorer([found.network for found in loaded], recipe)  # refuses tiles that do not fit the networks
    last = named[-1] or catalog.find_hash(recipe.steps[-1].weights)
    protocol = job.protocol or (last.protocol if last else "stored")
    weights = tuple(
        name if "://" in name or entry else str(path)  # each node finds the first two for itself
        for name, entry, path in zip(job.checkpoint, named, paths, strict=True)
    )
    convention = Convention(protocol, job.metrics, job.crop_border, job.y_channel)
    return Prepared(job, weights, recipe, convention.name)
