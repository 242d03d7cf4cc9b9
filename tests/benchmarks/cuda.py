"""The networks on a CUDA GPU: width 32, GoPro layout, 1280x720. Nothing to show without one."""

import copy
import time
from collections.abc import Callable

import torch

from nafnet.model import Block, NetConfig, Network
from nafnet.tlc import localize
from tests.benchmarks.timing import Row
from tests.nafnet.reference import randomize

HEIGHT, WIDTH, TRAIN_SIZE = 720, 1280, 256
BATCHES = (1, 2, 4, 8, 16)
DTYPES = {"float32": torch.float32, "TF32": torch.float32, "float16": torch.float16, "bf16": torch.bfloat16}


def rows(runs: int) -> tuple[list[Row], list[str]]:
    """The table's rows, each against plain NCHW float32 on the same GPU, and lines on memory and batches."""
    if not torch.cuda.is_available():
        return [], []
    network = randomize(Network(NetConfig())).eval()
    plain = _seconds(copy.deepcopy(localize(copy.deepcopy(network), TRAIN_SIZE)).cuda(), torch.float32, 1, runs)
    bandwidth = _bandwidth()
    table, lines = [], [f"copies on this GPU move {bandwidth / 1e9:,.0f} GB/s"]
    for name, dtype in DTYPES.items():
        for compiled in (False, True):
            with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=name == "TF32"):
                local = _ready(localize(copy.deepcopy(network), TRAIN_SIZE), dtype, compiled)
                everywhere = _ready(copy.deepcopy(network), dtype, compiled)
                torch.cuda.reset_peak_memory_stats()
                seconds = _seconds(local, dtype, 1, runs)
                memory = torch.cuda.max_memory_allocated()
                share = 1 - _seconds(everywhere, dtype, 1, runs) / seconds
                by_batch = {batch: batch / _seconds(local, dtype, batch, runs) for batch in BATCHES}
            what = f"CUDA, NAFNet, {name}, {'compiled' if compiled else 'eager'}, TLC"
            floor = _least_bytes(network.config, dtype.itemsize) / bandwidth
            table.append(Row(what, seconds, plain, plain / seconds, floor))
            best = max(by_batch, key=by_batch.__getitem__)
            lines.append(
                f"{what}: {memory / 2**20:,.0f} MiB, {by_batch[1]:.1f} images/s alone, {by_batch[best]:.1f} in batches "
                f"of {best}, TLC {share:.0%} of the time, {floor / seconds:.0%} of the memory-bandwidth floor"
            )
    return table, lines


def _ready(network: Network, dtype: torch.dtype, compiled: bool) -> Network:
    network = network.to("cuda", dtype).to(memory_format=torch.channels_last)
    if compiled:
        for module in network.modules():
            if isinstance(module, Block):
                module.compile(dynamic=True)
    return network


@torch.inference_mode()
def _seconds(network: Network, dtype: torch.dtype, batch: int, runs: int) -> float:
    """The fastest of a few runs for one batch."""
    images = torch.rand(batch, 3, HEIGHT, WIDTH, device="cuda")
    if dtype != torch.float32:
        images = images.to(memory_format=torch.channels_last)
    return min(_clock(lambda: network(images)) for _ in range(runs + 2))


def _clock(call: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def _bandwidth() -> float:
    """Bytes a second, read and written, of a large copy."""
    source = torch.empty(2**28, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(_clock(lambda: target.copy_(source)) for _ in range(5))


def _least_bytes(config: NetConfig, number: int) -> int:
    """Feature maps that no fusion spares: each block reads and writes its image, and what its attention scales."""
    groups = [*enumerate(config.enc_blocks), (config.levels, config.middle_blocks)]
    groups += [(config.levels - 1 - i, count) for i, count in enumerate(config.dec_blocks)]
    return sum(
        count * 4 * (HEIGHT >> level) * (WIDTH >> level) * config.width * 2**level * number for level, count in groups
    )
