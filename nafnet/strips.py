"""The network on a CPU: the same arithmetic, walked through in strips of rows that stay in the cache.

Layer by layer, a network of this family moves each feature map to memory and back some forty times a block, and waits
for it: that takes longer than the arithmetic. Here a block is two walks over the image. The first goes from its input
to its gate, a strip of rows at a time, with two rows kept for the depthwise 3x3; the second, which needs the means
that the first made possible, goes from there to its output, in place. What is constant per channel (the norm's scale
and shift, the residual's) is folded into the neighbouring 1x1 convolutions, and those are matrix products.

Of an image that one strip holds, calling torch takes longer than what it computes. Such images go through a block at
once, as many as a strip holds.
"""

import math
from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's usual name

from nafnet.memory import STRIP_BYTES
from nafnet.model import SIGMAS, Block, LayerNorm2d, NetConfig, Network
from nafnet.normalize import normalize
from nafnet.pointwise import Pointwise, PointwiseSum, Then, as_image
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
        """Restore ([N,] H, W, image_channels) float32, about [0, 1]: what `Network` gives, to 1e-5 in float32."""
        if image.ndim == 3:
            return self(image[None])[0]
        _, height, width, _ = image.shape
        stride = self.config.stride
        if height % stride or width % stride:  # padding by nothing would copy the image
            image = F.pad(image, (0, 0, 0, -width % stride, 0, -height % stride))
        # What blocks make between their walks, largest at full resolution: fresh memory for each would cost more than
        # what some of them compute.
        config = self.config
        inner = config.width * config.dw_expand // (2 if config.activation == "gate" else 1)
        space = image.new_empty(image.shape[1] * image.shape[2] * inner, dtype=self.dtype)
        x, *deeper = self._maps(*image.shape[:3])
        self._intro(image.to(self.dtype), x)
        skips = []
        for encoder, down, below in zip(self._encoders, self._downs, deeper, strict=True):
            for block in encoder:
                block(x, space)
            skips.append(x)
            down(x, below)
            x = below
        for block in self._middle:
            block(x, space)
        for up, decoder in zip(self._ups, self._decoders, strict=True):
            x = up(x, skips.pop())
            for block in decoder:
                block(x, space)
        del space
        restored = torch.empty_like(image)
        self._ending(x, restored)
        return restored.add_(image)[:, :height, :width]

    def _maps(self, count: int, height: int, width: int) -> list[Tensor]:
        """The images' feature maps on each level, in one piece of memory: strips between them would leave gaps."""
        shapes = [
            (count, height >> level, width >> level, self.config.width << level)
            for level in range(self.config.levels + 1)
        ]
        sizes = [math.prod(shape) for shape in shapes]
        pieces = torch.split(torch.empty(sum(sizes), dtype=self.dtype), sizes)
        return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]


class _Block:
    """One residual block; (N, H, W, C) is changed in place."""

    def __init__(self, block: Block, dtype: torch.dtype) -> None:
        self.norms = isinstance(block.norm1, LayerNorm2d), isinstance(block.norm2, LayerNorm2d)
        self.activation, self.sigma = block.activation, SIGMAS[block.sigma]
        self.depthwise = _weights(block.conv2.weight, dtype), _weights(cast(Tensor, block.conv2.bias), dtype)
        self.conv1 = Pointwise(*_after_norm(block.norm1, block.conv1, dtype))
        self.conv3 = PointwiseSum(*_before_scale(block.conv3, block.beta, dtype))
        then = "none" if block.activation == "gate" else block.activation
        self.widened = block.conv4.out_channels
        self.conv4 = Pointwise(*_after_norm(block.norm2, block.conv4, dtype), then)
        self.conv5 = PointwiseSum(*_before_scale(block.conv5, block.gamma, dtype))
        attention = block.sca or block.se
        self.window: int | None = None
        self.attention: list[Pointwise] = []  # SCA is one layer; CA is two with a ReLU between them, then a sigmoid
        if attention is not None:
            pool, *layers = attention
            self.window = pool.side if isinstance(pool, LocalAvgPool2d) else None
            thens: tuple[Then, ...] = ("none",) if block.sca is not None else ("relu", "sigmoid")
            convs = [layer for layer in layers if isinstance(layer, nn.Conv2d)]
            self.attention = [
                Pointwise(_weights(conv.weight[..., 0, 0], dtype), _weights(cast(Tensor, conv.bias), dtype), then)
                for conv, then in zip(convs, thens, strict=True)
            ]

    def __call__(self, x: Tensor, space: Tensor) -> None:
        """`space` is memory for (H, W, inner)."""
        _, height, width, _ = x.shape
        inner, widest = self.conv3.weight.shape[1], max(self.depthwise[0].shape[0], self.widened)
        together = _rows(height * width * widest * x.element_size(), least=0)
        if together and not self._is_local(height, width):
            for images in torch.split(x, together):
                self._at_once(images)
            return
        for image in x:
            self._walk(image, space[: height * width * inner].view(height, width, inner))

    def _at_once(self, x: Tensor) -> None:
        """Images (n, H, W, C) that one strip holds, without a local window."""
        rows = x.flatten(0, 1)
        z = self.conv1(self._norm(rows, 0)).view(*x.shape[:3], -1)
        z = F.conv2d(z.permute(0, 3, 1, 2), *self.depthwise, padding=1, groups=z.shape[3]).permute(0, 2, 3, 1)
        y = self._activate(z, z.new_empty(*x.shape[:3], self.conv3.weight.shape[1]))
        if self.attention:
            y *= self._scale(y.mean((1, 2), keepdim=True, dtype=torch.float32).to(y.dtype).flatten(1, 2))[:, None]
        self.conv3(rows, y.flatten(0, 1))
        self.conv5(rows, self._gate(self.conv4(self._norm(rows, 1))))

    def _walk(self, x: Tensor, y: Tensor) -> None:
        """One image (H, W, C), in strips; y is memory for (H, W, inner)."""
        height, width, inner = y.shape
        self._first_walk(x, y)
        if self._is_local(height, width):
            self._second_walk(x, y, self.conv3, self.window)
        elif self.attention:  # one value per channel: folded into the convolution that reads what it scales
            scale = self._scale(mean(y).to(y.dtype).view(1, 1, inner))
            self._second_walk(x, y, PointwiseSum(self.conv3.weight * scale[0, 0], self.conv3.bias), None)
        else:
            self._second_walk(x, y, self.conv3, None)

    def _first_walk(self, x: Tensor, y: Tensor) -> None:
        """Norm, 1x1, depthwise 3x3 and activation: (H, W, C) to (H, W, inner), which is y."""
        height, width, _ = x.shape
        wide = self.depthwise[0].shape[0]
        rows = _rows(width * wide * x.element_size())
        above = x.new_zeros(1, width, wide)  # the last rows, two at most, that the next strip's first rows need
        done = 0
        for top in range(0, height, rows):
            strip = self.conv1(self._norm(x[top : top + rows], 0))
            seam = torch.cat((above, strip[:2]))
            above = seam[-2:] if len(strip) < 2 else strip[-2:].clone()
            done = self._convolve(strip, y, self._convolve(seam, y, done))
            del strip  # before the next is made
        self._convolve(torch.cat((above, x.new_zeros(1, width, wide))), y, done)

    def _convolve(self, strip: Tensor, y: Tensor, top: int) -> int:
        """Depthwise 3x3 and activation of all rows but the outer two, to y from row `top` on: the row after them."""
        bottom = top + len(strip) - 2
        if bottom <= top:
            return top
        z = F.conv2d(as_image(strip), *self.depthwise, padding=(0, 1), groups=strip.shape[2])
        self._activate(z[0].permute(1, 2, 0), y[top:bottom])
        return bottom

    def _second_walk(self, x: Tensor, y: Tensor, conv3: PointwiseSum, window: int | None) -> None:
        """Attention and 1x1, added to x; then norm, 1x1, activation, 1x1, added to x."""
        height, width, _ = x.shape
        rows = min(_rows(width * max(self.widened, y.shape[2]) * x.element_size()), height)
        scaled = x.new_empty(rows, width, y.shape[2])
        for top, bottom, scale, shift in self._scales(y, window, rows):
            strip, z = x[top:bottom], y[top:bottom]
            if scale is not None:
                z = times(z, scale, shift, scaled[: bottom - top])
            conv3(strip, z)
            self.conv5(strip, self._gate(self.conv4(self._norm(strip, 1))))

    def _scales(self, y: Tensor, window: int | None, rows: int) -> Iterator[tuple[int, int, Tensor | None, int]]:
        """Strips of `rows` rows, with their attention and its shift, as `nafnet.sliding.times` takes them."""
        height = len(y)
        strips = [(top, min(top + rows, height)) for top in range(0, height, rows)]
        if window is None:
            for top, bottom in strips:
                yield top, bottom, None, 0
            return
        means = SlidingMeans(y, window, rows)
        scale = y.new_empty(0)
        done = 0  # rows of windows
        for top, bottom in strips:
            fresh = min(max(bottom - means.before, 1), means.count) - done
            first = done
            if fresh:
                last, scale = scale[-1:], self._scale(means.next_rows(fresh))
                if max(top - means.before, 0) < done:
                    scale, first = torch.cat((last, scale)), done - 1
            else:
                scale, first = scale[-1:], done - 1
            done += fresh
            yield top, bottom, scale, top - means.before - first

    def _is_local(self, height: int, width: int) -> bool:
        """Whether the attention has a window smaller than the map."""
        return self.window is not None and self.window < max(height, width)

    def _scale(self, means: Tensor) -> Tensor:
        """Means (h, w, inner) to what they scale by."""
        for layer in self.attention:
            means = layer(means)
        return means

    def _norm(self, x: Tensor, half: int) -> Tensor:
        return normalize(x) if self.norms[half] else x

    def _activate(self, y: Tensor, out: Tensor) -> Tensor:
        if self.activation == "gate":
            return self._gate(y, out)
        if self.activation == "gelu":
            return cast(Tensor, torch.ops.aten.gelu.out(y, out=out))
        return torch.clamp(y, min=0, out=out)

    def _gate(self, y: Tensor, out: Tensor | None = None) -> Tensor:
        """One half times the other, where it was not another activation that went before."""
        if self.activation != "gate":
            return y
        first, second = y.chunk(2, dim=-1)
        return torch.mul(first, self.sigma(second), out=out)


class _Down:
    """2x2 stride 2, channels doubled: a product with the four pixels side by side."""

    def __init__(self, conv: nn.Module, dtype: torch.dtype) -> None:
        weight, bias = cast(Tensor, conv.weight), cast(Tensor, conv.bias)
        self.layer = Pointwise(_weights(weight.permute(0, 2, 3, 1).flatten(1), dtype), _weights(bias, dtype))

    def __call__(self, x: Tensor, out: Tensor) -> None:
        """(N, H, W, C) to (N, H / 2, W / 2, 2 C), which is `out`."""
        x, out = x.flatten(0, 1), out.flatten(0, 1)  # one image below the other
        height, width, channels = x.shape
        pixels = x.view(height // 2, 2, width // 2, 2, channels).transpose(1, 2)
        rows = _rows(2 * width * channels * x.element_size())
        for top in range(0, height // 2, rows):
            out[top : top + rows] = self.layer(pixels[top : top + rows].flatten(2))


class _Up:
    """1x1 and pixel shuffle, channels halved; added to the skip in place."""

    def __init__(self, up: nn.Module, dtype: torch.dtype) -> None:
        weight = cast(Tensor, cast(nn.Sequential, up)[0].weight)[..., 0, 0]  # (channels, 2, 2), in
        self.layer = Pointwise(
            _weights(weight.view(-1, 2, 2, weight.shape[1]).permute(1, 2, 0, 3).flatten(0, 2), dtype), None
        )

    def __call__(self, x: Tensor, skip: Tensor) -> Tensor:
        """(N, H, W, C), added to the skip (N, 2 H, 2 W, C / 2), which comes back."""
        x = x.flatten(0, 1)  # one image below the other
        height, width, channels = x.shape
        pixels = skip.view(height, 2, width, 2, channels // 2).transpose(1, 2)
        rows = _rows(2 * width * channels * x.element_size())
        for top in range(0, height, rows):
            strip = self.layer(x[top : top + rows])
            pixels[top : top + rows].add_(strip.view(len(strip), width, 2, 2, channels // 2))
        return skip


class _Conv3x3:
    """The first and the last convolution."""

    def __init__(self, conv: nn.Conv2d, dtype: torch.dtype) -> None:
        self.weight = _weights(conv.weight, dtype).contiguous(memory_format=torch.channels_last)
        self.bias = _weights(cast(Tensor, conv.bias), dtype)

    def __call__(self, x: Tensor, out: Tensor) -> None:
        """(N, H, W, c) to (N, H, W, d), which is `out`, of whatever dtype."""
        _, height, width, _ = x.shape
        row_bytes = width * max(self.weight.shape[:2]) * x.element_size()
        together = _rows(height * row_bytes, least=0)
        if together:
            for images, outs in zip(torch.split(x, together), torch.split(out, together), strict=True):
                strip = images.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
                outs.copy_(F.conv2d(strip, self.weight, self.bias, padding=1).permute(0, 2, 3, 1))
            return
        for image, one in zip(x, out, strict=True):
            self._walk(image, one, _rows(row_bytes))

    def _walk(self, x: Tensor, out: Tensor, rows: int) -> None:
        height = len(x)
        for top in range(0, height, rows):
            bottom = min(top + rows, height)
            above, below = min(top, 1), min(height - bottom, 1)
            strip = as_image(x[top - above : bottom + below])
            if not above or not below:
                strip = F.pad(strip, (0, 0, 1 - above, 1 - below))
            strip = strip.contiguous(memory_format=torch.channels_last)
            out[top:bottom] = F.conv2d(strip, self.weight, self.bias, padding=(0, 1))[0].permute(1, 2, 0)


def _blocks(group: nn.Module, dtype: torch.dtype) -> list[_Block]:
    return [_Block(cast(Block, block), dtype) for block in cast(nn.Sequential, group)]


def _rows(row_bytes: int, *, least: int = 1) -> int:
    """Rows in a strip, or images."""
    return max(least, STRIP_BYTES * torch.get_num_threads() // row_bytes)


def _after_norm(norm: nn.Module, conv: nn.Conv2d, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(out, in) weights and bias that do what the norm's scale and shift and then the convolution do."""
    weight, bias = conv.weight[..., 0, 0].double(), cast(Tensor, conv.bias).double()
    if isinstance(norm, LayerNorm2d):
        bias = bias + weight @ norm.bias.double()
        weight = weight * norm.weight.double()
    return _weights(weight, dtype), _weights(bias, dtype)


def _before_scale(conv: nn.Conv2d, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(out, in) weights and bias of the convolution followed by the residual's scale (1, c, 1, 1)."""
    factor = scale.double().flatten()
    weight, bias = conv.weight[..., 0, 0].double(), cast(Tensor, conv.bias).double()
    return _weights(weight * factor[:, None], dtype), _weights(bias * factor, dtype)


def _weights(values: Tensor, dtype: torch.dtype) -> Tensor:
    return values.detach().to(dtype, copy=True).contiguous()
