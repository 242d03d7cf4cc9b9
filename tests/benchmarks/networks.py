"""The networks on this machine's CPU: width 32, GoPro layout, 1280x720, TLC, one image at a time, all cores."""

from collections.abc import Callable
from functools import partial

import torch

from nafnet.model import NetConfig, Network, multiply_adds
from nafnet.restore import has_arithmetic
from nafnet.strips import StripNetwork
from nafnet.tlc import localize, windows
from tests.benchmarks import plain
from tests.benchmarks.timing import Row, clock, compare, measure_all
from tests.nafnet.reference import randomize

HEIGHT, WIDTH = 720, 1280
TRAIN_SIZE = 256
MIXED = ((97, 131), (256, 256), (333, 500), (480, 640), (720, 1280))
BARS = {"float32": 2.5, "bf16": 6.0}
CONFIGS = {
    "NAFNet": NetConfig(),
    "Baseline": NetConfig(activation="gelu", attention="ca", dw_expand=1),
}


def rows(runs: int) -> list[Row]:
    return [row for name in CONFIGS for row in _rows_of(name, runs)]


def _rows_of(name: str, runs: int) -> list[Row]:
    config = CONFIGS[name]
    network = randomize(Network(config))
    image = torch.rand(HEIGHT, WIDTH, 3, generator=torch.Generator().manual_seed(0))
    planar = image.permute(2, 0, 1)[None].contiguous()

    def plainly() -> torch.Tensor:
        return plain.run(network, planar, train_size=TRAIN_SIZE)

    everywhere = StripNetwork(network)
    local = StripNetwork(localize(network, TRAIN_SIZE))
    difference = float((local(image).permute(2, 0, 1) - plainly()[0]).abs().max())
    pairs = {"float32": (local, everywhere)}
    if has_arithmetic("bf16"):
        pairs["bf16"] = _half(network, TRAIN_SIZE), _half(network, None)
    calls: dict[str, Callable[[], object]] = {precision: partial(ours, image) for precision, (ours, _) in pairs.items()}
    calls["plain"] = plainly
    if name == "NAFNet":
        layers = network.to(memory_format=torch.channels_last)
        calls["layers"] = torch.inference_mode()(lambda: layers(planar.to(memory_format=torch.channels_last)))
    seconds = measure_all(calls, runs)
    table = []
    for precision, pair in pairs.items():
        what = f"{name}, {precision}, TLC" + (f" (differs by {difference:.0e})" if precision == "float32" else "")
        floor = _arithmetic_seconds(config, precision)
        table.append(compare(what, seconds[precision], seconds["plain"], floor=floor, bar=BARS[precision]))
        table.append(_share(f"{name}, {precision}: TLC against global means", *pair, image, runs))
    if "layers" in seconds:
        what = f"{name}, float32, TLC: strips against layer by layer"
        table.append(compare(what, seconds["float32"], seconds["layers"]))
        table.append(_mixed(network, runs))
    return table


def _share(what: str, local: StripNetwork, everywhere: StripNetwork, image: torch.Tensor, runs: int) -> Row:
    """Nothing else in between, and more often: the difference is about as small as what a machine's speed varies by."""
    seconds = measure_all({"local": lambda: local(image), "global": lambda: everywhere(image)}, 5 * runs)
    return compare(what, seconds["local"], seconds["global"], bar=1 / 1.1)


def _half(network: Network, train_size: int | None) -> StripNetwork:
    copy = Network(network.config)
    copy.load_state_dict(network.state_dict())
    return StripNetwork(copy if train_size is None else localize(copy, train_size), torch.bfloat16)


def _mixed(network: Network, runs: int) -> Row:
    """A job of five images of five sizes, everything included that a first image costs."""
    images = [torch.rand(height, width, 3) for height, width in MIXED]
    layers = network.to(memory_format=torch.channels_last)

    def ours() -> None:
        strips = StripNetwork(network)
        for image in images:
            strips(image)

    @torch.inference_mode()
    def eager() -> None:
        for image in images:
            layers(image[None].permute(0, 3, 1, 2))

    times = [(clock(ours), clock(eager)) for _ in range(runs)]
    what = "NAFNet, float32, TLC: five sizes, cold, against layer by layer"
    return compare(what, [a for a, _ in times], [b for _, b in times], bar=1.0)


def _arithmetic_seconds(config: NetConfig, precision: str) -> float:
    """What the convolutions take at the speed of this machine's best matrix product."""
    dtype = torch.float32 if precision == "float32" else torch.bfloat16
    a, b = torch.rand(2048, 2048).to(dtype), torch.rand(2048, 2048).to(dtype)
    best = min(clock(lambda: a @ b) for _ in range(8))
    return (multiply_adds(config, HEIGHT, WIDTH) + _attention_adds(config)) / 2048**3 * best


def _attention_adds(config: NetConfig) -> int:
    """Multiply-adds of the attention on every local mean, which global means do not need."""
    total, deepest = 0, config.levels
    groups = [*enumerate(config.enc_blocks), (deepest, config.middle_blocks)]
    groups += [(deepest - 1 - i, count) for i, count in enumerate(config.dec_blocks)]
    for level, count in groups:
        side = windows(config, TRAIN_SIZE)[level]
        means = max((HEIGHT >> level) - side + 1, 1) * max((WIDTH >> level) - side + 1, 1)
        inner = config.width * 2**level * config.dw_expand // (2 if config.activation == "gate" else 1)
        total += count * means * inner**2
    return total
