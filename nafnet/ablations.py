"""The paper's ablation networks as a table: buildable by name for either data set, with their published scores.

"Simple Baselines for Image Restoration" (arXiv 2204.04676v4), Tables 1, 2, 3 and 5. A row turns one dial of
`NetConfig`, or changes the number of blocks; the width is always 32. One network may be in several tables under several
names. Scores are PSNR in dB of networks that the authors trained for each data set; no checkpoints of these rows are
public, except for those that are Baseline or NAFNet (`nafnet.catalog`, where the released files score a little higher).
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from fnmatch import fnmatchcase
from typing import Literal, get_args

from nafnet.model import NetConfig, Network

Data = Literal["gopro", "sidd"]
Layout = tuple[tuple[int, ...], int, tuple[int, ...]]  # blocks of the encoder, the middle and the decoder

# Where the blocks are. For 36 it is as in the released files; for 9, 18 and 72 the paper prints the number alone, so
# those are this project's choice. GoPro: one block a group, all others in the deepest encoder level (in Table 3 each
# block above 18 adds the same 1.4 to 1.5 ms, as blocks of one level do). SIDD: in proportion, at least one a group.
LAYOUTS: dict[Data, dict[int, Layout]] = {
    "gopro": {
        9: ((1, 1, 1, 1), 1, (1, 1, 1, 1)),
        18: ((1, 1, 1, 10), 1, (1, 1, 1, 1)),
        36: ((1, 1, 1, 28), 1, (1, 1, 1, 1)),
        72: ((1, 1, 1, 64), 1, (1, 1, 1, 1)),
    },
    "sidd": {
        9: ((1, 1, 1, 1), 1, (1, 1, 1, 1)),
        18: ((1, 1, 2, 4), 6, (1, 1, 1, 1)),
        36: ((2, 2, 4, 8), 12, (2, 2, 2, 2)),
        72: ((4, 4, 8, 16), 24, (4, 4, 4, 4)),
    },
}
PUBLISHED_LAYOUT = 36  # blocks


@dataclass(frozen=True, slots=True)
class Ablation:
    """One row of one of the paper's tables.

    Attributes:
        table: its number in the paper.
        block: the dials; its layout is that of `blocks` blocks for GoPro.
        psnr_sidd, psnr_gopro: published means (dB).
        learning_rate: at the start of training. PlainNet's is a tenth of the others', so that the step from it to the
            layer norm changes two things.
        latency_ms: published for one image of 1280x720 px (Table 3 alone).
    """

    name: str
    table: int
    block: NetConfig
    blocks: int
    psnr_sidd: float
    psnr_gopro: float
    learning_rate: float = 1e-3
    latency_ms: float | None = None

    def config(self, data: Data) -> NetConfig:
        """The network for this data set; ValueError for another one."""
        if data not in LAYOUTS:
            raise ValueError(f"data must be one of {', '.join(get_args(Data))}, got {data!r}")
        enc, middle, dec = LAYOUTS[data][self.blocks]
        return replace(self.block, enc_blocks=enc, middle_blocks=middle, dec_blocks=dec)


# A gate halves its channels, so the gated rows widen twice as far before it (dw_expand), for about the same arithmetic.
_PLAINNET = NetConfig(norm="none", activation="relu", attention="none", dw_expand=1)
_LN = replace(_PLAINNET, norm="layer")
_GELU = replace(_LN, activation="gelu")
_BASELINE = replace(_GELU, attention="ca")
_NAFNET = NetConfig()

_ROWS = (
    Ablation("table1/plainnet", 1, _PLAINNET, 36, 39.29, 28.51, learning_rate=1e-4),
    Ablation("table1/plainnet+ln", 1, _LN, 36, 39.73, 31.90),
    Ablation("table1/plainnet+ln+gelu", 1, _GELU, 36, 39.71, 32.11),
    Ablation("table1/baseline", 1, _BASELINE, 36, 39.85, 32.35),
    Ablation("table2/baseline", 2, _BASELINE, 36, 39.85, 32.35),
    Ablation("table2/baseline+sg", 2, replace(_BASELINE, activation="gate", dw_expand=2), 36, 39.93, 32.76),
    Ablation("table2/baseline+sca", 2, replace(_BASELINE, attention="sca"), 36, 39.95, 32.54),
    Ablation("table2/nafnet", 2, _NAFNET, 36, 39.96, 32.85),
    Ablation("table3/9-blocks", 3, _NAFNET, 9, 39.78, 31.79, latency_ms=154.7),
    Ablation("table3/18-blocks", 3, _NAFNET, 18, 39.90, 32.64, latency_ms=151.7),
    Ablation("table3/36-blocks", 3, _NAFNET, 36, 39.96, 32.85, latency_ms=177.1),
    Ablation("table3/72-blocks", 3, _NAFNET, 72, 39.95, 32.88, latency_ms=230.1),
    Ablation("table5/identity", 5, _NAFNET, 36, 39.96, 32.85),
    Ablation("table5/relu", 5, replace(_NAFNET, sigma="relu"), 36, 39.98, 32.59),
    Ablation("table5/gelu", 5, replace(_NAFNET, sigma="gelu"), 36, 39.97, 32.72),
    Ablation("table5/sigmoid", 5, replace(_NAFNET, sigma="sigmoid"), 36, 39.99, 32.50),
    Ablation("table5/silu", 5, replace(_NAFNET, sigma="silu"), 36, 39.96, 32.74),
)

ABLATIONS: dict[str, Ablation] = {row.name: row for row in _ROWS}


def config(name: str, data: Data) -> NetConfig:
    """The network of one row for this data set; ValueError, with near names, for a name that is not in the table."""
    if name not in ABLATIONS:
        raise ValueError(_unknown(name))
    return ABLATIONS[name].config(data)


def build(name: str, data: Data) -> Network:
    """`config` as a network with fresh weights, on torch's default device."""
    return Network(config(name, data))


def select(*patterns: str) -> list[Ablation]:
    """The rows for a benchmark, in the paper's order: names, tables ("table3"), or globs ("*/baseline*").

    Raises:
        ValueError: patterns that match nothing, all of them, with near names.
    """
    found = {pattern: {row.name for row in _ROWS if _matches(row.name, pattern)} for pattern in patterns}
    unknown = [_unknown(pattern) for pattern, names in found.items() if not names]
    if unknown:
        raise ValueError("; ".join(unknown))
    names = set[str]().union(*found.values())
    return [row for row in _ROWS if row.name in names]


def near(name: str, names: Iterable[str]) -> list[str]:
    """At most five of `names` that a person may have meant by `name`, likeliest first."""
    alike = {known: _likeness(name, known) for known in names}
    return sorted((known for known in alike if alike[known] > 0.6), key=lambda known: -alike[known])[:5]


def _likeness(name: str, known: str) -> float:
    """From 0 to 1: to the whole name, or to a part of it."""
    parts = (known, *known.split("/"))
    return max(SequenceMatcher(None, name.lower(), part.lower()).ratio() for part in parts)


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name.partition("/")[0], pattern)


def _unknown(name: str) -> str:
    names = near(name, ABLATIONS)
    return f"no ablation is called {name!r}: " + (f"near it are {', '.join(names)}" if names else ", ".join(ABLATIONS))
