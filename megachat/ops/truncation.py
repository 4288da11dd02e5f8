"""The one place for what top-k and top-p keep: `lowest_kept`, an edge for each row.

Tokens exactly as likely as the last one that is kept are kept, too, so the result depends neither
on an order among them nor on how the vocabulary is cut over a tensor group.
"""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from megachat.parallel.collectives import all_gather_last_dim, all_reduce_sum

_DIGIT_BITS = 8
"""Width of a digit in the search for the edge of a nucleus."""


def lowest_kept(
    choice: Tensor, *, top_k: int, top_p: float, group: ProcessGroup | None = None
) -> Tensor:
    """The edge of top-k and then top-p; a collective call of the group.

    Args:
        choice: `[rows, columns]` float32, minus infinity where a token is impossible.
        top_k: How many tokens are kept; 0 for all.
        top_p: The mass of the fewest tokens that are kept, of that of exactly k; 1 for all.
        group: Ranks whose columns together are the vocabulary; None where the rows are whole.

    Returns:
        `[rows]` float32, of the whole vocabulary: what is below it is cut.
    """
    if not top_k:
        return _nucleus_edge(choice, top_p, group)
    largest = _largest(choice, top_k, group)
    if top_p == 1.0:
        return largest[:, -1].contiguous()
    masses = largest.double().softmax(dim=1)
    outside = masses.cumsum(dim=1) - masses >= top_p
    return largest.masked_fill(outside, torch.inf).amin(dim=1)


def _largest(choice: Tensor, count: int, group: ProcessGroup | None) -> Tensor:
    """`[rows, count]`, or all, largest logits of the whole vocabulary in falling order."""
    largest = choice.topk(min(count, choice.shape[1]), dim=1).values
    if group is None or group.size() == 1:
        return largest
    largest = F.pad(largest, (0, count - largest.shape[1]), value=-torch.inf)
    return all_gather_last_dim(largest, group).topk(count, dim=1).values


def _nucleus_edge(choice: Tensor, top_p: float, group: ProcessGroup | None) -> Tensor:
    """The smallest logit of each row's nucleus, `[rows]`.

    Finds the largest x for which the tokens with logits of at least x have mass p, digit by digit
    of its binary form: each pass sums the mass by the next digit, over all ranks, among the tokens
    that agree in the digits before. Four histograms of 256 numbers a row are exchanged, whatever
    the vocabulary.
    """
    num_rows, num_columns = choice.shape
    peak = choice.amax(dim=1, keepdim=True)
    if group is not None:
        peak = all_gather_last_dim(peak, group).amax(dim=1, keepdim=True)
    weights = (choice - peak).exp_().double().flatten()
    ordered = _order_preserving(choice).flatten()
    rows = torch.arange(num_rows, device=choice.device).repeat_interleave(num_columns)
    edge = ordered.new_zeros(num_rows)
    above = weights.new_zeros(num_rows, 1)
    wanted = weights.new_full((num_rows, 1), -1.0)
    for shift in range(32 - _DIGIT_BITS, -1, -_DIGIT_BITS):
        histogram = weights.new_zeros(num_rows, 1 << _DIGIT_BITS)
        digits = (ordered >> shift) & ((1 << _DIGIT_BITS) - 1)
        histogram.view(-1).index_add_(0, (rows << _DIGIT_BITS) + digits, weights)
        if group is not None:
            all_reduce_sum(histogram, group)
        if shift == 32 - _DIGIT_BITS:
            wanted = top_p * histogram.sum(dim=1, keepdim=True)
        from_top = histogram.flip(1).cumsum(dim=1).flip(1) + above
        # The mass falls with the digit: count the digits that still reach p.
        digit = (from_top >= wanted).sum(dim=1, keepdim=True).sub_(1).clamp_(min=0)
        above = from_top.gather(1, digit) - histogram.gather(1, digit)
        edge |= digit.squeeze(1) << shift
        agreeing = (digits == digit.squeeze(1)[rows]).nonzero().squeeze(1)
        rows, ordered, weights = rows[agreeing], ordered[agreeing], weights[agreeing]
    return _order_restoring(edge)


def _order_preserving(x: Tensor) -> Tensor:
    """float32 numbers to int64 in [0, 2**32) in the same order."""
    bits = x.view(torch.int32)
    flipped = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return flipped.long() + (1 << 31)


def _order_restoring(ordered: Tensor) -> Tensor:
    """Inverse of `_order_preserving`."""
    flipped = (ordered - (1 << 31)).int()
    return torch.where(flipped < 0, flipped ^ 0x7FFFFFFF, flipped).view(torch.float32)
