"""What the tests of compiled loops share."""

import pytest
import torch
from torch import Tensor


@pytest.fixture(params=[1, 2, 3], ids="{} threads".format)
def _threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def noise(*size: int) -> Tensor:
    return torch.rand(*size, generator=torch.Generator().manual_seed(1))
