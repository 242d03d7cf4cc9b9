"""TLC, the test-time local converter (Chu et al., arXiv 2112.04491): attention that sees what it saw in training.

SCA and CA average each channel over the whole image. In training that was a small crop; on a full photo the mean's
statistics differ, which costs 0.6 dB on GoPro. TLC replaces the global mean by the mean over a window of 1.5 times the
crop, clipped at the borders. The window depends on the crop and the depth alone, so it is fixed here, once.
"""

import torch
from torch import Tensor, nn

from nafnet.model import Block, NetConfig, Network


def windows(config: NetConfig, train_size: int) -> tuple[int, ...]:
    """The side in px of the window at each level, level 0 (full resolution) first and the middle last.

    `train_size` is the side of the training crops at full resolution (px); 256 for the published networks gives 384,
    192, 96, 48, 24.
    """
    base = train_size * 3 // 2
    sides = [(train_size >> level) * base // train_size for level in range(config.levels + 1)]
    if sides[-1] < 1:
        raise ValueError(f"train_size {train_size} is too small for a network of {config.levels} levels")
    return tuple(sides)


def localize(network: Network, train_size: int) -> Network:
    """Turn every attention's global mean into a local one, in place; the weights stay as they are."""
    sides = windows(network.config, train_size)
    for level, blocks in _groups(network):
        for block in blocks:
            attention = block.sca or block.se if isinstance(block, Block) else None
            if attention is not None:
                attention[0] = LocalAvgPool2d(sides[level])
    return network


def _groups(network: Network) -> list[tuple[int, nn.Sequential]]:
    """Each group of blocks with its level: 0 at full resolution, one more for every halving."""
    depth = network.config.levels
    groups = [(level, group) for level, group in enumerate(network.encoders)]
    groups.append((depth, network.middle_blks))
    groups += [(depth - 1 - i, group) for i, group in enumerate(network.decoders)]
    return [(level, group) for level, group in groups if isinstance(group, nn.Sequential)]


class LocalAvgPool2d(nn.Module):
    """Means over a window of `side` x `side` px at each place where it fits wholly (valid box means).

    (N, C, H, W) becomes (N, C, max(H - side, 0) + 1, max(W - side, 0) + 1), in x's dtype: a window longer than the
    image is as long as the image, so only a window that covers both sides gives the global mean. Spread by repeating
    its edges (`nafnet.model.spread`), the result at i is the mean over [s, s + k), k = min(side, n) and
    s = clip(i - (k - 1) // 2, 0, n - k).
    """

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, x: Tensor) -> Tensor:
        """Sums run in float32 whatever x is: a float16 sum overflows at 1280x720."""
        pixels = x.permute(0, 2, 3, 1)  # N, H, W, C: whole pixels are added, channels side by side
        sums = _window_sums(_window_sums(pixels, self.side, dim=1), self.side, dim=2)
        area = min(self.side, x.shape[-2]) * min(self.side, x.shape[-1])
        return (sums / area).to(x.dtype).permute(0, 3, 1, 2)

    def extra_repr(self) -> str:
        """Shown by print(network)."""
        return f"side={self.side}"


def _window_sums(x: Tensor, side: int, *, dim: int) -> Tensor:
    """float32 sums over every `side` neighbours along `dim`."""
    n = x.shape[dim]
    if side >= n:
        return x.sum(dim, keepdim=True, dtype=torch.float32)
    if x.is_cuda:  # one pass there; on a CPU torch.cumsum is scalar and takes as long as the whole network
        total = x.cumsum(dim, dtype=torch.float32)
        inner = total.narrow(dim, side, n - side) - total.narrow(dim, 0, n - side)
        return torch.cat([total.narrow(dim, side - 1, 1), inner], dim)
    x = x.float()
    count = n - side + 1
    shape = list(x.shape)
    shape[dim] = count
    sums = torch.empty(shape, dtype=torch.float32)
    old, new = x.unbind(dim), sums.unbind(dim)
    change = torch.empty_like(new[0])
    for i in range(count):
        if i % side == 0:  # a fresh sum now and then, or rounding errors of the running one would grow with the image
            torch.sum(x.narrow(dim, i, side), dim, out=new[i])
        else:
            torch.sub(old[i + side - 1], old[i - 1], out=change)
            torch.add(new[i - 1], change, out=new[i])
    return sums
