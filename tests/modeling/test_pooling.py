"""Adaptive pooling as matrix products, for exported programs, against torch's own."""

import pytest
import torch
from torch.nn import functional as F

from the_mask.modeling.pixel.pooling import _cells, adaptive_average, square_columns


@pytest.mark.parametrize(
    ("height", "width", "rows", "columns"), [(4, 6, 8, 12), (7, 5, 2, 1), (12, 24, 8, 16), (3, 9, 6, 6), (1, 1, 3, 2)]
)
def test_products_equal_adaptive_pooling(height, width, rows, columns):
    x = torch.randn(2, 3, height, width, dtype=torch.float64)
    expected = F.adaptive_avg_pool2d(x, (rows, columns))
    torch.testing.assert_close(_cells(rows, height, x) @ x @ _cells(columns, width, x).t(), expected)
    assert torch.equal(adaptive_average(x, rows, columns), expected)


def test_columns_of_square_cells():
    """The released SwiftNet rounds the aspect ratio times the rows, halves to the even number."""
    for height in range(1, 40):
        for width in range(1, 90):
            for rows in (8, 4, 2):
                assert square_columns(rows, height, width) == max(1, round(width / height * rows))


def test_pooling_of_a_size_that_varies():
    class Pool(torch.nn.Module):
        def forward(self, x):
            return adaptive_average(x, 3, square_columns(3, x.shape[-2], x.shape[-1]))

    sides = {2: torch.export.Dim("height", min=2, max=64), 3: torch.export.Dim("width", min=2, max=64)}
    exported = torch.export.export(Pool(), (torch.zeros(1, 2, 8, 12),), dynamic_shapes=(sides,)).module()
    for size in ((8, 12), (5, 31), (40, 60)):
        x = torch.randn(1, 2, *size)
        torch.testing.assert_close(exported(x), Pool()(x))
