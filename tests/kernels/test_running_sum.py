import pytest
import torch

from zexp.kernels.running_sum import by_product, running_sum


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_both_ways_sum_along_the_dimension(dim, reverse):
    x = torch.randn(3, 5, 4, dtype=torch.float64)
    expected = torch.empty_like(x)
    for i in range(x.shape[dim]):
        part = x.narrow(dim, i, x.shape[dim] - i) if reverse else x.narrow(dim, 0, i + 1)
        expected.select(dim, i).copy_(part.sum(dim))
    torch.testing.assert_close(running_sum(x, dim, reverse=reverse), expected)
    torch.testing.assert_close(by_product(x, dim, reverse=reverse), expected)
