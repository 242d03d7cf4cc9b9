"""What this project is measured against: the networks as plain eager float32 NCHW code, TLC by cumulative sums."""

from unittest.mock import patch

import torch
from torch import Tensor

from nafnet.model import Network
from tests.nafnet import reference


def run(network: Network, image: Tensor, *, train_size: int | None) -> Tensor:
    """Restore (N, C, H, W) float32 in PyTorch's default memory order."""
    state = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    activation = network.config.activation
    with torch.inference_mode(), patch.object(reference, "mean", _mean):
        return reference.network(state, image.contiguous(), activation=activation, train_size=train_size)


def _mean(x: Tensor, side: int | None) -> Tensor:
    if side is None:
        return x.mean((2, 3), keepdim=True)
    (top, bottom), (left, right) = reference.bounds(x.shape[2], side), reference.bounds(x.shape[3], side)
    total = torch.nn.functional.pad(x.cumsum(2).cumsum(3), (1, 0, 1, 0))
    rows = total[:, :, bottom] - total[:, :, top]
    return (rows[..., right] - rows[..., left]) / ((bottom - top)[:, None] * (right - left))
