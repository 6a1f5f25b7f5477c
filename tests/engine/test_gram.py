"""A Gram matrix of which half is computed is the Gram matrix."""

from __future__ import annotations

import pytest
import torch

from llmpruner.engine.statistics import add_gram, both_triangles


@pytest.mark.parametrize("width", [0, 1, 3, 4, 5, 17, 64])
def test_half_of_the_products_give_the_whole_matrix(width):
    parts = [torch.randn(rows, width, dtype=torch.float64) for rows in (1, 40, 0)]
    lower = torch.zeros(width, width, dtype=torch.float64)
    for part in parts:
        add_gram(lower, part)
    whole = torch.cat(parts)
    torch.testing.assert_close(both_triangles(lower), whole.T @ whole)
