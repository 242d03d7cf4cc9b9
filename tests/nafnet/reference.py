"""The networks written a second time, plainly, from the paper's equations (arXiv 2204.04676v4, arXiv 2112.04491).

Functions on a state dict, (N, C, H, W) in PyTorch's default memory order, no module and no line of `nafnet`: what the
tests compare `nafnet.model` and `nafnet.tlc` with. Slow.
"""

import re

import torch
from torch.nn import functional as F  # noqa: N812 - the field's usual name

SIGMAS = {
    "identity": lambda x: x,
    "relu": lambda x: x.clamp(min=0),
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)),
    "sigmoid": lambda x: 1 / (1 + torch.exp(-x)),
    "silu": lambda x: x / (1 + torch.exp(-x)),
}


def network(state, image, *, activation="gate", sigma="identity", train_size=None):
    """Restore `image`; with a `train_size` (px) the attention's means are TLC's local ones."""
    levels = groups(state, r"downs\.(\d+)\.weight")
    height, width = image.shape[-2:]
    stride = 2**levels
    image = F.pad(image, (0, -width % stride, 0, -height % stride))

    def blocks(name, x, level):
        for i in range(groups(state, rf"{name}\.(\d+)\.conv1\.weight")):
            x = block(part(state, f"{name}.{i}."), x, activation, sigma, window(train_size, level))
        return x

    x = F.conv2d(image, state["intro.weight"], state["intro.bias"], padding=1)
    skips = []
    for level in range(levels):
        x = blocks(f"encoders.{level}", x, level)
        skips.append(x)
        x = F.conv2d(x, state[f"downs.{level}.weight"], state[f"downs.{level}.bias"], stride=2)
    x = blocks("middle_blks", x, levels)
    for i in range(levels):
        level = levels - 1 - i
        x = pixel_shuffle(F.conv2d(x, state[f"ups.{i}.0.weight"])) + skips[level]
        x = blocks(f"decoders.{i}", x, level)
    x = F.conv2d(x, state["ending.weight"], state["ending.bias"], padding=1) + image
    return x[..., :height, :width]


def block(state, x, activation, sigma, side):
    """One block of the family; its norms and attention are those that the state has."""

    def conv(name, x, **options):
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], **options)

    def activate(x):
        if activation == "gate":
            half = x.shape[1] // 2
            return x[:, :half] * SIGMAS[sigma](x[:, half:])
        return SIGMAS[activation](x)

    y = layer_norm(state, "norm1", x)
    y = conv("conv1", y)
    y = activate(conv("conv2", y, padding=1, groups=y.shape[1]))
    if "sca.1.weight" in state:
        y = y * conv("sca.1", mean(y, side))
    if "se.1.weight" in state:
        squeezed = conv("se.1", mean(y, side)).clamp(min=0)
        y = y * SIGMAS["sigmoid"](conv("se.3", squeezed))
    x = x + conv("conv3", y) * state["beta"]
    y = activate(conv("conv4", layer_norm(state, "norm2", x)))
    return x + conv("conv5", y) * state["gamma"]


def layer_norm(state, name, x):
    """Over the channels of each pixel; nothing where the state has no norm."""
    if f"{name}.weight" not in state:
        return x
    mu = x.mean(1, keepdim=True)
    variance = ((x - mu) ** 2).mean(1, keepdim=True)
    scale, shift = (state[f"{name}.{which}"][None, :, None, None] for which in ("weight", "bias"))
    return (x - mu) / (variance + 1e-6).sqrt() * scale + shift


def pixel_shuffle(x):
    """(N, 4c, H, W) to (N, c, 2H, 2W)."""
    n, c, h, w = x.shape
    return x.reshape(n, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3).reshape(n, c // 4, 2 * h, 2 * w)


def window(train_size, level):
    """TLC's window at a level (px): 1.5 times what the training crop measured there."""
    return None if train_size is None else (train_size // 2**level) * int(1.5 * train_size) // train_size


def mean(x, side):
    """The mean over the whole image, or at each pixel the mean over the window nearest to it (float64 sums)."""
    if side is None:
        return x.mean((2, 3), keepdim=True)
    (top, bottom), (left, right) = bounds(x.shape[2], side), bounds(x.shape[3], side)
    total = F.pad(x.double().cumsum(2).cumsum(3), (1, 0, 1, 0))
    rows = total[:, :, bottom] - total[:, :, top]
    area = (bottom - top)[:, None] * (right - left)
    return ((rows[..., right] - rows[..., left]) / area).to(x.dtype)


def bounds(n, side):
    """First and one-past-last index of the window of each of n pixels."""
    k = min(side, n)
    start = (torch.arange(n) - (k - 1) // 2).clamp(0, n - k)
    return start, start + k


def groups(state, pattern):
    """How many different numbers stand where the pattern has its group."""
    return len({match[1] for name in state if (match := re.fullmatch(pattern, name))})


def part(state, prefix):
    """The tensors below a prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


@torch.no_grad()
def randomize(module, seed=0):
    """Fill every parameter, so that each counts: at its start beta and gamma are zero, and no block does anything."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        if parameter.ndim == 4 and not name.endswith(("beta", "gamma")):
            # Means vary little and a sigmoid flattens them; what is added to the image is to be about as large as it.
            gain = 3 if ".se." in name else 0.25 if name.startswith("ending") else 1
            reach = gain * (3 / parameter[0].numel()) ** 0.5
        else:
            reach = 0.4
        parameter.uniform_(-reach, reach, generator=generator)
        if re.search(r"norm\d\.weight$", name):
            parameter.add_(1)
    return module.eval()
