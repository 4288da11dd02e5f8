import pytest
import torch
from torch import nn

from megachat.errors import ConfigError
from megachat.model import ModelOptions
from megachat.model.dropout import (
    ResidualAdd,
    attention_with_dropout,
    dropout_mask,
    require_dropout_key,
)


def test_mask_keeps_the_stated_share_and_its_mean_is_one() -> None:
    mask = dropout_mask(torch.empty(200, 500), probability=0.1, seed=3)
    assert mask.unique().tolist() == pytest.approx([0.0, 1 / 0.9])
    assert (mask == 0).float().mean().item() == pytest.approx(0.1, abs=0.005)


def test_mask_depends_on_its_seed_and_leaves_the_global_stream_alone() -> None:
    like = torch.empty(64)
    before = torch.get_rng_state()
    first, again, other = (dropout_mask(like, probability=0.5, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(before, torch.get_rng_state())


def test_residual_sum_drops_the_biased_branch_only_while_training() -> None:
    x, bias, residual = torch.randn(6, 2, 8), torch.randn(8), torch.randn(6, 2, 8)
    add = ResidualAdd(norm=None)
    add.seed = 11
    trained = add(True, False)((x, bias), residual, 0.3)
    mask = dropout_mask(x, probability=0.3, seed=11)
    torch.testing.assert_close(trained, residual + (x + bias) * mask)
    for out in (
        add(False, False)((x, bias), residual, 0.3),
        add(True, False)((x, bias), residual, 0.0),
    ):
        torch.testing.assert_close(out, residual + x + bias)


def test_residual_sum_of_a_post_ln_model_ends_in_the_norm() -> None:
    x, residual = torch.randn(6, 2, 8), torch.randn(6, 2, 8)
    add = ResidualAdd(norm=lambda: nn.LayerNorm(8))
    out = add(True, False)((x, None), residual, 0.0)
    torch.testing.assert_close(out, nn.functional.layer_norm(x + residual, (8,)))


def test_attention_with_dropout_tends_to_plain_attention_and_stays_causal() -> None:
    query, key, value = (torch.randn(1, 2, 5, 4) for _ in range(3))
    plain = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    torch.testing.assert_close(attention_with_dropout(query, key, value, 1e-9, 0), plain)
    mean = torch.stack(
        [attention_with_dropout(query, key, value, 0.2, seed) for seed in range(4000)]
    ).mean(0)
    torch.testing.assert_close(mean, plain, atol=0.05, rtol=0.0)
    changed = value.clone()
    changed[:, :, -1] += 1.0
    first, second = (attention_with_dropout(query, key, v, 0.2, 1) for v in (value, changed))
    assert torch.equal(first[:, :, :-1], second[:, :, :-1])


def test_training_with_dropout_but_without_a_key_is_refused() -> None:
    require_dropout_key(ModelOptions(), None)
    require_dropout_key(ModelOptions(hidden_dropout=0.1), 5)
    with pytest.raises(ConfigError, match="set_dropout_key"):
        require_dropout_key(ModelOptions(attention_dropout=0.1), None)
