"""The network on a CPU: the same arithmetic, walked through in strips of rows that stay in the cache.

Layer by layer, a network of this family moves each feature map to memory and back some forty times a block, and waits
for it: that takes longer than the arithmetic. Here a block is two walks over the image. The first goes from its input
to its gate, a strip of rows at a time, with two rows kept for the depthwise 3x3; the second, which needs the means
that the first made possible, goes from there to its output, in place. What is constant per channel (the norm's scale
and shift, the residual's) is folded into the neighbouring 1x1 convolutions, and those are matrix products.
"""

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's usual name

from nafnet.memory import STRIP_BYTES
from nafnet.model import SIGMAS, Block, LayerNorm2d, NetConfig, Network
from nafnet.sliding import SlidingMeans, mean, times
from nafnet.tlc import LocalAvgPool2d


class StripNetwork:
    """A `Network` prepared for inference on the CPU in one dtype. It keeps its own copy of the weights."""

    def __init__(self, network: Network, dtype: torch.dtype = torch.float32) -> None:
        """Take the weights, and the TLC windows if it is localized, of a float32 network."""
        self.config: NetConfig = network.config
        self.dtype = dtype
        intro, ending = network.intro, network.ending
        self._intro = _Conv3x3(intro, dtype)
        self._ending = _Conv3x3(ending, dtype)
        self._encoders = [_blocks(group, dtype) for group in network.encoders]
        self._middle = _blocks(network.middle_blks, dtype)
        self._decoders = [_blocks(group, dtype) for group in network.decoders]
        self._downs = [_Down(conv, dtype) for conv in network.downs]
        self._ups = [_Up(up, dtype) for up in network.ups]

    @torch.inference_mode()
    def __call__(self, image: Tensor) -> Tensor:
        """Restore (H, W, image_channels) float32, about [0, 1]: what `Network` gives, to 1e-5 in float32."""
        height, width, _ = image.shape
        stride = self.config.stride
        if height % stride or width % stride:  # padding by nothing would copy the image
            image = F.pad(image, (0, 0, 0, -width % stride, 0, -height % stride))
        x = self._intro(image.to(self.dtype), self.dtype)
        # What blocks make between their walks, largest at full resolution: fresh memory for each would cost more than
        # what some of them compute.
        config = self.config
        inner = config.width * config.dw_expand // (2 if config.activation == "gate" else 1)
        space = x.new_empty(x.shape[0] * x.shape[1] * inner)
        skips = []
        for encoder, down in zip(self._encoders, self._downs, strict=True):
            for block in encoder:
                block(x, space)
            skips.append(x)
            x = down(x)
        for block in self._middle:
            block(x, space)
        for up, decoder in zip(self._ups, self._decoders, strict=True):
            x = up(x, skips.pop())
            for block in decoder:
                block(x, space)
        del space
        return self._ending(x, torch.float32).add_(image)[:height, :width]


class _Block:
    """One residual block; (H, W, C) is changed in place."""

    def __init__(self, block: Block, dtype: torch.dtype) -> None:
        self.norms = isinstance(block.norm1, LayerNorm2d), isinstance(block.norm2, LayerNorm2d)
        self.conv1 = _after_norm(block.norm1, block.conv1, dtype)
        self.depthwise = _weights(block.conv2.weight, dtype), _weights(cast(Tensor, block.conv2.bias), dtype)
        self.conv3 = _before_scale(block.conv3, block.beta, dtype)
        self.conv4 = _after_norm(block.norm2, block.conv4, dtype)
        self.conv5 = _before_scale(block.conv5, block.gamma, dtype)
        self.activation, self.sigma = block.activation, SIGMAS[block.sigma]
        attention = block.sca or block.se
        self.window: int | None = None
        self.excite: list[tuple[Tensor, Tensor]] = []
        if attention is not None:
            pool, *layers = attention
            self.excite = [_linear(layer, dtype) for layer in layers if isinstance(layer, nn.Conv2d)]
            self.window = pool.side if isinstance(pool, LocalAvgPool2d) else None

    def __call__(self, x: Tensor, space: Tensor) -> None:
        """`space` is memory for (H, W, inner)."""
        height, width, _ = x.shape
        inner = self.conv3[1].shape[0]
        y = self._first_walk(x, space[: height * width * inner].view(height, width, inner))
        bias, weight = self.conv3
        if self.window is not None and self.window < max(height, width):
            self._second_walk(x, y, self.conv3, self.window)
            return
        if self.excite:  # one value per channel: folded into the convolution that reads what it scales
            scale = y.new_empty(1, inner)
            self._attention(mean(y).to(y.dtype)[None], scale)
            weight = scale.view(inner, 1) * weight
        self._second_walk(x, y, (bias, weight), None)

    def _first_walk(self, x: Tensor, y: Tensor) -> Tensor:
        """Norm, 1x1, depthwise 3x3 and activation: (H, W, C) to (H, W, inner), which is y."""
        height, width, _ = x.shape
        wide = self.conv1[1].shape[1]
        rows = min(_rows(width * wide * x.element_size()), height)
        ring = x.new_empty(rows + 2, width, wide)  # row 0 is the one above the strip, the last the one below
        ring[0].zero_()
        for top in range(0, height, rows):
            bottom = min(top + rows, height)
            if top:
                ring[0].copy_(ring[rows])
                ring[1].copy_(ring[rows + 1])
            first, last = top + 1 if top else 0, min(bottom + 1, height)
            if first < last:
                into = ring[first - top + 1 : last - top + 1]
                _product(self.conv1, self._norm(x[first:last], 0), into)
            if bottom == height:
                ring[bottom - top + 1].zero_()
            strip = ring[None, : bottom - top + 2].permute(0, 3, 1, 2)
            weight, bias = self.depthwise
            z = F.conv2d(strip, weight, bias, padding=(0, 1), groups=wide)
            self._activate(z[0].permute(1, 2, 0), y[top:bottom])
        return y

    def _second_walk(self, x: Tensor, y: Tensor, conv3: tuple[Tensor, Tensor], window: int | None) -> None:
        """Attention and 1x1, added to x; then norm, 1x1, activation, 1x1, added to x."""
        height, width, _ = x.shape
        wide, inner = self.conv4[1].shape[1], self.conv5[1].shape[0]
        rows = min(_rows(width * max(wide, y.shape[2]) * x.element_size()), height)
        scaled, widened = x.new_empty(rows, width, y.shape[2]), x.new_empty(rows, width, wide)
        gated = x.new_empty(rows, width, inner)
        for top, bottom, scale, shift in self._scales(y, window, rows):
            count = bottom - top
            strip, z = x[top:bottom], y[top:bottom]
            if scale is not None:
                z = times(z, scale, shift, scaled[:count])
            _add_product(strip, conv3, z)
            _product(self.conv4, self._norm(strip, 1), widened[:count])
            self._activate(widened[:count], gated[:count])
            _add_product(strip, self.conv5, gated[:count])

    def _scales(self, y: Tensor, window: int | None, rows: int) -> Iterator[tuple[int, int, Tensor | None, int]]:
        """Strips of `rows` rows, with their attention and its shift, as `nafnet.sliding.times` takes them."""
        height, _, inner = y.shape
        strips = [(top, min(top + rows, height)) for top in range(0, height, rows)]
        if window is None:
            for top, bottom in strips:
                yield top, bottom, None, 0
            return
        means = SlidingMeans(y, window, rows)
        scale = y.new_empty(rows + 1, means.columns, inner)
        done = fresh = 0  # rows of windows before this strip, and in it
        for top, bottom in strips:
            if fresh:
                scale[0] = scale[fresh]  # the last one before this strip, which its first rows may need
            done += fresh
            fresh = min(max(bottom - means.before, 1), means.count) - done
            if fresh:
                self._attention(means.next_rows(fresh).flatten(0, 1), scale[1 : fresh + 1].flatten(0, 1))
            first = 0 if done else 1
            yield top, bottom, scale[first : fresh + 1], top - means.before - (done - 1 + first)

    def _attention(self, means: Tensor, out: Tensor) -> None:
        """(n, inner) to (n, inner): SCA is one layer; CA is two with a ReLU between them, then a sigmoid."""
        *before, (bias, weight) = self.excite
        for layer in before:
            means = torch.addmm(layer[0], means, layer[1]).relu_()
        torch.addmm(bias, means, weight, out=out)
        if before:
            out.sigmoid_()

    def _norm(self, x: Tensor, half: int) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=1e-6) if self.norms[half] else x

    def _activate(self, y: Tensor, out: Tensor) -> None:
        if self.activation == "gate":
            first, second = y.chunk(2, dim=-1)
            torch.mul(first, self.sigma(second), out=out)
        elif self.activation == "gelu":
            torch.ops.aten.gelu.out(y, out=out)
        else:
            torch.clamp(y, min=0, out=out)


class _Down:
    """2x2 stride 2, channels doubled: a product with the four pixels side by side."""

    def __init__(self, conv: nn.Module, dtype: torch.dtype) -> None:
        weight, bias = cast(Tensor, conv.weight), cast(Tensor, conv.bias)
        self.layer = _weights(bias, dtype), _weights(weight.permute(2, 3, 1, 0).flatten(0, 2), dtype)

    def __call__(self, x: Tensor) -> Tensor:
        height, width, channels = x.shape
        out = x.new_empty(height // 2, width // 2, 2 * channels)
        pixels = x.view(height // 2, 2, width // 2, 2, channels).transpose(1, 2)
        rows = _rows(2 * width * channels * x.element_size())
        for top in range(0, height // 2, rows):
            _product(self.layer, pixels[top : top + rows].flatten(2), out[top : top + rows])
        return out


class _Up:
    """1x1 and pixel shuffle, channels halved; added to the skip in place."""

    def __init__(self, up: nn.Module, dtype: torch.dtype) -> None:
        weight = cast(Tensor, cast(nn.Sequential, up)[0].weight)[..., 0, 0]  # (channels, 2, 2), in
        self.weight = _weights(weight.view(-1, 2, 2, weight.shape[1]).permute(3, 1, 2, 0).flatten(1), dtype)

    def __call__(self, x: Tensor, skip: Tensor) -> Tensor:
        height, width, channels = x.shape
        pixels = skip.view(height, 2, width, 2, channels // 2).transpose(1, 2)
        rows = _rows(2 * width * channels * x.element_size())
        for top in range(0, height, rows):
            strip = x[top : top + rows]
            spread = strip.flatten(0, 1) @ self.weight
            pixels[top : top + rows].add_(spread.view(len(strip), width, 2, 2, channels // 2))
        return skip


class _Conv3x3:
    """The first and the last convolution."""

    def __init__(self, conv: nn.Conv2d, dtype: torch.dtype) -> None:
        self.weight = _weights(conv.weight, dtype).contiguous(memory_format=torch.channels_last)
        self.bias = _weights(cast(Tensor, conv.bias), dtype)

    def __call__(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        height, width, _ = x.shape
        out = x.new_empty(height, width, self.weight.shape[0], dtype=dtype)
        rows = _rows(width * max(self.weight.shape[:2]) * x.element_size())
        for top in range(0, height, rows):
            bottom = min(top + rows, height)
            above, below = min(top, 1), min(height - bottom, 1)
            strip = x[None, top - above : bottom + below].permute(0, 3, 1, 2)
            if not above or not below:
                strip = F.pad(strip, (0, 0, 1 - above, 1 - below))
            strip = strip.contiguous(memory_format=torch.channels_last)
            out[top:bottom] = F.conv2d(strip, self.weight, self.bias, padding=(0, 1))[0].permute(1, 2, 0)
        return out


def _blocks(group: nn.Module, dtype: torch.dtype) -> list[_Block]:
    return [_Block(cast(Block, block), dtype) for block in cast(nn.Sequential, group)]


def _rows(row_bytes: int) -> int:
    """Rows in a strip."""
    return max(1, STRIP_BYTES * torch.get_num_threads() // row_bytes)


def _product(layer: tuple[Tensor, Tensor], x: Tensor, out: Tensor) -> None:
    """1x1 convolution of (h, w, c) into (h, w, d)."""
    bias, weight = layer
    torch.addmm(bias, x.flatten(0, 1), weight, out=out.flatten(0, 1))


def _add_product(x: Tensor, layer: tuple[Tensor, Tensor], y: Tensor) -> None:
    """x += 1x1 convolution of y, (h, w, c) both."""
    bias, weight = layer
    x.flatten(0, 1).add_(bias).addmm_(y.flatten(0, 1), weight)


def _after_norm(norm: nn.Module, conv: nn.Conv2d, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Bias and (in, out) weights that do what the norm's scale and shift and then the convolution do."""
    weight, bias = conv.weight[..., 0, 0].double(), cast(Tensor, conv.bias).double()
    if isinstance(norm, LayerNorm2d):
        bias = bias + weight @ norm.bias.double()
        weight = weight * norm.weight.double()
    return _weights(bias, dtype), _weights(weight.t(), dtype)


def _before_scale(conv: nn.Conv2d, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Bias and (in, out) weights of the convolution followed by the residual's scale (1, c, 1, 1)."""
    factor = scale.double().flatten()
    weight, bias = conv.weight[..., 0, 0].double(), cast(Tensor, conv.bias).double()
    return _weights(bias * factor, dtype), _weights((weight * factor[:, None]).t(), dtype)


def _linear(layer: nn.Conv2d, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Bias and (in, out) weights of a 1x1 convolution."""
    return _weights(cast(Tensor, layer.bias), dtype), _weights(layer.weight[..., 0, 0].t(), dtype)


def _weights(values: Tensor, dtype: torch.dtype) -> Tensor:
    return values.detach().to(dtype).contiguous()
