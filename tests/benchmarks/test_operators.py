"""Counts of operators, floating-point operations and bytes, by hand."""

import torch
from torch.nn import functional as F

from hf_tokenmixup.benchmarks.operators import count_work


def test_count_work_of_product_counts_its_operands_and_views_nothing():
    left, right = torch.ones(2, 3), torch.ones(5, 3)
    work = count_work(lambda: left @ right.T)
    assert (work.operators, work.flops) == (1, 2 * 2 * 3 * 5)
    assert work.moved_bytes == 4 * (6 + 15 + 10)


def test_count_work_of_expanded_and_in_place_tensors_counts_memory_once_per_read_and_write():
    row, total = torch.ones(1, 7), torch.zeros(4, 7)
    work = count_work(lambda: total.add_(row.expand(4, 7)))
    assert (work.operators, work.flops, work.moved_bytes) == (1, 0, 4 * (28 + 7 + 28))


def test_count_work_of_backward_counts_both_gradients():
    left, right = torch.ones(2, 3, requires_grad=True), torch.ones(3, 5, requires_grad=True)
    work = count_work(lambda: (left @ right).sum().backward())
    assert work.flops == 3 * 2 * 2 * 3 * 5


def test_count_work_of_fused_attention_counts_both_products():
    query = torch.ones(2, 4, 6, 8)
    work = count_work(lambda: F.scaled_dot_product_attention(query, query, query))
    assert work.flops == 2 * (2 * 2 * 4 * 6 * 6 * 8)


def test_count_work_with_few_images_counts_their_operators_only():
    left, right = torch.ones(2, 3), torch.ones(3, 5)
    chunks = count_work(lambda: [row @ right for row in left.split(1)], lambda: left @ right)
    assert (chunks.operators, chunks.flops) == (1, 2 * 2 * 3 * 5)


def test_count_work_of_list_of_tensors_counts_each():
    parts = [torch.ones(2, 3), torch.ones(4, 3)]
    assert count_work(lambda: torch.cat(parts)).moved_bytes == 2 * 4 * 18
