"""NAFNet and its family in one file: one block with four dials, and the U that stacks it.

The networks of "Simple Baselines for Image Restoration" (Chen, Chu, Zhang, Sun; arXiv 2204.04676v4). Walking from
PlainNet to NAFNet turns one dial at a time (section 3, Figure 3): add a layer norm, replace ReLU by GELU, add channel
attention (that is Baseline), replace GELU by a gate, and simplify the attention (that is NAFNet). Module names are
those of the authors' files, so published state dicts load strictly.

Inside the network tensors are (N, C, H, W) in channels-last memory order: at each pixel the channels lie side by side,
which is what the layer norm and the 1x1 convolutions (nearly all the arithmetic) read.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's usual name
from torch.utils.flop_counter import FlopCounterMode

Norm = Literal["layer", "none"]
Activation = Literal["gate", "gelu", "relu"]
Attention = Literal["sca", "ca", "none"]
Sigma = Literal["identity", "relu", "gelu", "sigmoid", "silu"]

SIGMAS: dict[Sigma, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
}


@dataclass(frozen=True, slots=True)
class NetConfig:
    """The shape of a network. Equal configs give equal state-dict names and tensor shapes.

    Attributes:
        width: channels at full resolution; they double at each level down.
        enc_blocks, middle_blocks, dec_blocks: blocks per level; `dec_blocks[0]` is the deepest level.
        image_channels: 3 for RGB, 1 for grey.
        dw_expand, ffn_expand: channel growth of the first 1x1 convolution in each half of a block.
        norm, activation, attention, sigma: the four dials (paper Tables 1 and 5). `sigma` acts on one half of the
            gate; only "identity" is the published NAFNet.
    """

    width: int = 32
    enc_blocks: tuple[int, ...] = (1, 1, 1, 28)
    middle_blocks: int = 1
    dec_blocks: tuple[int, ...] = (1, 1, 1, 1)
    image_channels: int = 3
    dw_expand: int = 2
    ffn_expand: int = 2
    norm: Norm = "layer"
    activation: Activation = "gate"
    attention: Attention = "sca"
    sigma: Sigma = "identity"

    def __post_init__(self) -> None:
        """Raise ValueError for a shape that no network has."""
        for dial, words in (("norm", Norm), ("activation", Activation), ("attention", Attention), ("sigma", Sigma)):
            if getattr(self, dial) not in get_args(words):
                raise ValueError(f"{dial} must be one of {', '.join(get_args(words))}, got {getattr(self, dial)!r}")
        if len(self.enc_blocks) != len(self.dec_blocks) or not self.enc_blocks:
            raise ValueError(f"as many encoder as decoder levels needed, got {self.enc_blocks} and {self.dec_blocks}")
        if min(self.width, self.image_channels, self.dw_expand, self.ffn_expand) < 1:
            raise ValueError("width, image_channels, dw_expand and ffn_expand must be at least 1")
        if min(self.middle_blocks, *self.enc_blocks, *self.dec_blocks) < 0:
            raise ValueError("a number of blocks cannot be negative")
        if self.activation == "gate" and (self.dw_expand * self.width % 2 or self.ffn_expand * self.width % 2):
            raise ValueError("a gate halves its channels: width times dw_expand and ffn_expand must be even")
        if self.sigma != "identity" and self.activation != "gate":
            raise ValueError(f"sigma={self.sigma!r} acts inside the gate, but activation is {self.activation!r}")

    @property
    def levels(self) -> int:
        """How often the U halves the resolution."""
        return len(self.enc_blocks)

    @property
    def stride(self) -> int:
        """Heights and widths are padded to a multiple of this (px)."""
        return int(2**self.levels)

    @property
    def family(self) -> str:
        """The paper's name for this combination of dials, or the dials themselves."""
        dials = (self.norm, self.activation, self.attention)
        names = {
            ("layer", "gate", "sca"): "NAFNet",
            ("layer", "gelu", "ca"): "Baseline",
            ("none", "relu", "none"): "PlainNet",
        }
        return names.get(dials, "+".join(dials))


class LayerNorm2d(nn.Module):
    """Normalises the channels of each pixel (N, C, H, W), eps 1e-6, then scales and shifts them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Same shape and dtype out."""
        pixels = x.permute(0, 2, 3, 1)  # a view when x is channels-last: the norm then reads whole cache lines
        out = F.layer_norm(pixels, self.weight.shape, self.weight, self.bias, 1e-6)
        return out.permute(0, 3, 1, 2)


class ChannelAttention(nn.Sequential):
    """Scales each channel by a weight computed from a mean of all channels: SCA (paper eq. 7) or CA (eq. 2).

    Layer 0 pools; its output may be one value per channel (the global mean used in training) or a smaller map of
    local means (see `nafnet.tlc`). The 1x1 convolutions run on that small map; only their result is spread over the
    image, by repeating its edges, which gives the same bits as spreading first.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) in and out."""
        weights: Tensor = super().forward(x)  # type: ignore[no-untyped-call]
        return x * spread(weights, x.shape[-2], x.shape[-1])


def spread(weights: Tensor, height: int, width: int) -> Tensor:
    """Grow (N, C, h, w) to (N, C, height, width) by repeating edges; a side of 1 is left to broadcasting.

    Of the n - m missing rows (n - m) // 2 go before and the rest after, as in TLC (arXiv 2112.04491, section 3.2).
    """
    h, w = weights.shape[-2:]
    rows = 0 if h == 1 else height - h
    columns = 0 if w == 1 else width - w
    if rows == 0 and columns == 0:
        return weights
    before_rows, before_columns = rows // 2, columns // 2
    padding = (before_columns, columns - before_columns, before_rows, rows - before_rows)
    return F.pad(weights, padding, mode="replicate")


class Block(nn.Module):
    """One residual block: a spatial half (depthwise 3x3, attention) and a per-pixel half (paper Figure 3)."""

    beta: Tensor
    gamma: Tensor

    def __init__(self, channels: int, config: NetConfig) -> None:
        super().__init__()
        c, wide, ffn = channels, channels * config.dw_expand, channels * config.ffn_expand
        gated = config.activation == "gate"
        inner = wide // 2 if gated else wide
        layer_norm = config.norm == "layer"
        self.norm1 = LayerNorm2d(c) if layer_norm else nn.Identity()
        self.conv1 = nn.Conv2d(c, wide, 1)
        self.conv2 = nn.Conv2d(wide, wide, 3, padding=1, groups=wide)
        self.sca = self.se = None
        if config.attention == "sca":
            self.sca = ChannelAttention(nn.AdaptiveAvgPool2d(1), nn.Conv2d(inner, inner, 1))
        elif config.attention == "ca":
            squeeze, excite = nn.Conv2d(inner, inner // 2, 1), nn.Conv2d(inner // 2, inner, 1)
            self.se = ChannelAttention(nn.AdaptiveAvgPool2d(1), squeeze, nn.ReLU(), excite, nn.Sigmoid())
        self.conv3 = nn.Conv2d(inner, c, 1)
        self.norm2 = LayerNorm2d(c) if layer_norm else nn.Identity()
        self.conv4 = nn.Conv2d(c, ffn, 1)
        self.conv5 = nn.Conv2d(ffn // 2 if gated else ffn, c, 1)
        self.beta = nn.Parameter(torch.zeros(1, c, 1, 1))  # zero: the block starts as the identity (skip-init)
        self.gamma = nn.Parameter(torch.zeros(1, c, 1, 1))
        self.activation = config.activation
        self.sigma = config.sigma

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) in and out."""
        y = self.conv2(self.conv1(self.norm1(x)))  #  N, wide, H, W
        y = self._activate(y)  #                      N, inner, H, W
        attention = self.sca or self.se
        if attention is not None:
            y = attention(y)
        x = x + self.conv3(y) * self.beta  #          N, C, H, W
        y = self._activate(self.conv4(self.norm2(x)))
        return cast(Tensor, x + self.conv5(y) * self.gamma)

    def _activate(self, y: Tensor) -> Tensor:
        if self.activation == "gate":  # paper eq. 3 and Table 5
            first, second = y.chunk(2, dim=1)
            return first * SIGMAS[self.sigma](second)
        return F.gelu(y) if self.activation == "gelu" else F.relu(y)


class Network(nn.Module):
    """The U: encoder, middle, decoder with additive skips, and the input added at the end (paper Figure 2c)."""

    def __init__(self, config: NetConfig) -> None:
        super().__init__()
        self.config = config
        c = config.width
        self.intro = nn.Conv2d(config.image_channels, c, 3, padding=1)
        self.encoders, self.downs = nn.ModuleList(), nn.ModuleList()
        for count in config.enc_blocks:
            self.encoders.append(_blocks(count, c, config))
            self.downs.append(nn.Conv2d(c, 2 * c, 2, stride=2))
            c *= 2
        self.middle_blks = _blocks(config.middle_blocks, c, config)
        self.ups, self.decoders = nn.ModuleList(), nn.ModuleList()
        for count in config.dec_blocks:
            self.ups.append(nn.Sequential(nn.Conv2d(c, 2 * c, 1, bias=False), nn.PixelShuffle(2)))
            c //= 2
            self.decoders.append(_blocks(count, c, config))
        self.ending = nn.Conv2d(c, config.image_channels, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        """Restore (N, image_channels, H, W), values about [0, 1]; same shape out, not clamped. Any H and W.

        A float32 image may enter a network of lower precision: what the network adds is then of that precision, but
        the image it is added to keeps its own, so that flat areas stay exact.
        """
        height, width = image.shape[-2:]
        stride = self.config.stride
        image = F.pad(image, (0, -width % stride, 0, -height % stride))
        x = self.intro(image.to(self.intro.weight.dtype))
        skips = []
        for encoder, down in zip(self.encoders, self.downs, strict=True):
            x = encoder(x)
            skips.append(x)
            x = down(x)
        x = self.middle_blks(x)
        for up, decoder in zip(self.ups, self.decoders, strict=True):
            x = decoder(up(x) + skips.pop())
        x = self.ending(x) + image
        return cast(Tensor, x[..., :height, :width])


def _blocks(count: int, channels: int, config: NetConfig) -> nn.Sequential:
    return nn.Sequential(*(Block(channels, config) for _ in range(count)))


def parameters(network: nn.Module) -> int:
    """How many numbers the network has learned."""
    return sum(p.numel() for p in network.parameters())


def multiply_adds(config: NetConfig, height: int, width: int) -> int:
    """Multiply-adds of all convolutions for one image of height x width px (the paper's MACs)."""
    with torch.device("meta"):
        network, image = Network(config), torch.empty(1, config.image_channels, height, width)
    with FlopCounterMode(display=False) as counter:
        network(image)
    return int(counter.get_total_flops()) // 2
