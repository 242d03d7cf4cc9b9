"""What the tests share: small networks in files, real photographs, and one Prefect server for the whole session."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from xdist.scheduler import LoadScopeScheduling

os.environ["PREFECT_SERVER_ANALYTICS_ENABLED"] = "false"
os.environ["DO_NOT_TRACK"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:  # each of the processes that share the tests keeps to one core
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# Threads of torch that wait for one another spin: on a core that someone else wants, ten times as long as they compute.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

from nafnet.model import NetConfig, Network

GOPRO_LIKE = NetConfig(width=8, enc_blocks=(1, 1, 1, 4), middle_blocks=1, dec_blocks=(1, 1, 1, 1))
SIDD_LIKE = NetConfig(width=8, enc_blocks=(2, 2, 1, 1), middle_blocks=2, dec_blocks=(1, 1, 2, 2))


# Each with a costly fixture that its tests share: one worker takes all of a file's.
_TOGETHER = {"tests/operation/test_operation.py", "tests/nafnet/test_train.py", "tests/pipelines/test_hostile.py"}
_LONGEST = {"tests/test_readme.py", "tests/chaos/test_chaos.py"}  # begun first, lest one worker waits for the other


class _Scheduler(LoadScopeScheduling):
    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return file if file in _TOGETHER else nodeid


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    return _Scheduler(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.nodeid.partition("::")[0] not in _LONGEST)


def random_network(config: NetConfig, seed: int = 0) -> Network:
    """A network whose every parameter is random, so that no branch is switched off by a zero."""
    torch.manual_seed(seed)
    network = Network(config)
    for name, parameter in network.named_parameters():
        if name.endswith(("beta", "gamma")):
            torch.nn.init.uniform_(parameter, -0.2, 0.2)
    torch.nn.init.normal_(network.ending.weight, std=0.002)  # restored images stay close to the degraded ones
    return network.eval()


def save_published(path: Path, network: Network) -> Path:
    """Write the network as the authors publish theirs: a .pth with the tensors under "params"."""
    torch.save({"params": network.state_dict()}, path)
    return path


@pytest.fixture(scope="session")
def checkpoint_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small NAFNet of the GoPro layout in the published format."""
    return save_published(tmp_path_factory.mktemp("weights") / "small.pth", random_network(GOPRO_LIKE))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


@pytest.fixture(autouse=True)
def loggers_as_they_were() -> Iterator[None]:
    """A command that is called in this process takes our loggers to its own stderr."""
    loggers = [logging.getLogger(name) for name in ("nafnet", "pipelines")]
    before = [(logger.handlers[:], logger.propagate, logger.level) for logger in loggers]
    yield
    for logger, (handlers, propagate, level) in zip(loggers, before, strict=True):
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[str]:
    """Prefect's own harness: a real server on a database of its own, for flows in this process; its API's URL."""
    from prefect.settings import get_current_settings
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=90):
        yield str(get_current_settings().api.url)


@pytest.fixture
def command_environment(prefect_server: str) -> dict[str, str]:
    """For commands in processes of their own: the session's server, where each would start one, and plain output."""
    return {**os.environ, "PREFECT_API_URL": prefect_server, "NO_COLOR": "1", "COLUMNS": "100"}
