import torch

from megachat.model import Head
from megachat.parallel.layout import ParallelLayout
from tests.harness import run_ranks
from tests.model import reference as ref

VOCAB = ref.POST_LN.vocab_size


def _logits_of_rank(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """(logits, gradient of the embedding shard for the best token's log-prob, frozen are equal)."""
    model = ref.build_model(ref.POST_LN, ParallelLayout(tensor=2), seed=1, dtype=dtype)
    batch = ref.random_batches(ref.POST_LN, 1)[0]
    logits = model(batch[:, : ref.SEQ])
    exponents = logits.float().exp().sum()
    exponents.backward()
    words = model.embedding_weights().words
    model.requires_grad_(False)
    return logits.detach(), words.grad, torch.equal(model(batch[:, : ref.SEQ]), logits)


def test_padding_columns_have_no_probability_and_no_gradient() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        ranks = run_ranks(2, _logits_of_rank, dtype)
        logits = torch.cat([rank[0] for rank in ranks], dim=-1)
        gradient = torch.cat([rank[1] for rank in ranks])
        assert logits.shape == (ref.ROWS, ref.SEQ, ref.POST_LN.padded_vocab(2))
        assert logits.is_contiguous()
        assert (logits[..., VOCAB:] == torch.finfo(dtype).min).all()
        assert logits[..., :VOCAB].abs().max() < 10
        assert logits.float().softmax(-1)[..., VOCAB:].sum() == 0
        assert not gradient[VOCAB:].any()
        assert gradient[:VOCAB].abs().sum(-1).gt(0).all()
        assert all(rank[2] for rank in ranks)


def _scores_of_rank() -> torch.Tensor:
    model = ref.build_model(
        ref.PRE_LN, ParallelLayout(tensor=2), head=Head.SCALAR, seed=1, dtype=torch.bfloat16
    )
    return model(ref.random_batches(ref.PRE_LN, 1)[0][:, : ref.SEQ]).detach()


def test_scores_are_fp32_and_equal_on_every_tensor_rank() -> None:
    first, second = run_ranks(2, _scores_of_rank)
    assert first.dtype is torch.float32
    assert first.shape == (ref.ROWS, ref.SEQ)
    assert torch.equal(first, second)
