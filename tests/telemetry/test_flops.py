"""Operation counts against torch's own counter on HuggingFace's OPT, and against published ones."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import OPTConfig, OPTForCausalLM, OPTForSequenceClassification

from megachat.telemetry.flops import (
    AttentionCost,
    Recomputation,
    TransformerShape,
    decode_bytes,
    forward_flops,
    generation_flops,
    ppo_flops,
    teraflops_per_device,
    training_flops,
)

VOCAB, HIDDEN, FFN, LAYERS = 96, 32, 80, 3
BATCH, SEQ = 2, 11


def opt_config(*, embed_dim: int = HIDDEN) -> OPTConfig:
    return OPTConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        ffn_dim=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        word_embed_proj_dim=embed_dim,
        max_position_embeddings=64,
        num_labels=1,
        dropout=0.0,
        attn_implementation="eager",
    )


def our_shape(*, embed_dim: int = HIDDEN, outputs: int = VOCAB) -> TransformerShape:
    return TransformerShape(
        hidden=HIDDEN, ffn=FFN, layers=LAYERS, embed_dim=embed_dim, outputs=outputs
    )


def token_batch() -> torch.Tensor:
    return torch.randint(4, VOCAB, (BATCH, SEQ), generator=torch.Generator().manual_seed(0))


def counted_by_module(model: torch.nn.Module, tokens: torch.Tensor) -> dict[str, int]:
    """torch's count of a forward pass by the class of the module that did it, and in total."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens)
    return {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}


def by_suffix(counts: dict[str, int], suffix: str) -> int:
    """Operations of all modules whose name ends in `suffix`."""
    return sum(value for name, value in counts.items() if name.endswith(suffix))


def test_each_forward_term_is_what_torch_counts_in_that_module() -> None:
    counts = counted_by_module(OPTForCausalLM(opt_config()), token_batch())
    ours = forward_flops(our_shape(), lengths=[SEQ] * BATCH, attention=AttentionCost.DENSE)
    assert ours.qkv == sum(by_suffix(counts, f".{name}_proj") for name in "qkv")
    assert ours.projection == by_suffix(counts, ".out_proj")
    assert ours.mlp == by_suffix(counts, ".fc1") + by_suffix(counts, ".fc2")
    assert ours.head == by_suffix(counts, ".lm_head")
    assert ours.scores == ours.values
    attention = by_suffix(counts, ".self_attn")
    assert ours.scores + ours.values == attention - ours.qkv - ours.projection
    assert ours.embedding_projections == 0
    assert ours.total == counts["Global"]


def test_projections_of_a_narrow_embedding_are_counted() -> None:
    counts = counted_by_module(OPTForCausalLM(opt_config(embed_dim=16)), token_batch())
    ours = forward_flops(
        our_shape(embed_dim=16), lengths=[SEQ] * BATCH, attention=AttentionCost.DENSE
    )
    projections = by_suffix(counts, ".project_in") + by_suffix(counts, ".project_out")
    assert ours.embedding_projections == projections > 0
    assert ours.total == counts["Global"]


def test_a_scalar_head_is_counted() -> None:
    model = OPTForSequenceClassification(opt_config())
    model.config.pad_token_id = 1
    counts = counted_by_module(model, token_batch())
    ours = forward_flops(our_shape(outputs=1), lengths=[SEQ] * BATCH, attention=AttentionCost.DENSE)
    assert ours.head == by_suffix(counts, ".score")
    assert ours.total == counts["Global"]


def test_a_training_step_is_three_forward_passes() -> None:
    model = OPTForCausalLM(opt_config())
    tokens = token_batch()
    with FlopCounterMode(display=False) as counter:
        model(tokens, labels=tokens).loss.backward()
    ours = training_flops(our_shape(), lengths=[SEQ] * BATCH, attention=AttentionCost.DENSE)
    assert ours == counter.get_total_flops()


def test_full_recomputation_repeats_the_layers_and_not_the_head() -> None:
    model = OPTForCausalLM(opt_config()).train()
    model.activation_checkpointing_enable({"use_reentrant": True})
    tokens = token_batch()
    with FlopCounterMode(display=False) as counter:
        model(tokens, labels=tokens).loss.backward()
    ours = training_flops(
        our_shape(),
        lengths=[SEQ] * BATCH,
        attention=AttentionCost.DENSE,
        recomputation=Recomputation.LAYERS,
    )
    assert ours == counter.get_total_flops()


def test_generation_is_a_prefill_and_single_token_steps() -> None:
    model = OPTForCausalLM(opt_config())
    response = 6
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        out = model.generate(
            token_batch(),
            attention_mask=torch.ones(BATCH, SEQ, dtype=torch.long),
            max_new_tokens=response,
            min_new_tokens=response,
            do_sample=False,
        )
    assert out.shape[1] == SEQ + response
    ours = generation_flops(
        our_shape(),
        prompt_lengths=[SEQ] * BATCH,
        response_lengths=[response] * BATCH,
        attention=AttentionCost.DENSE,
    )
    assert ours == counter.get_total_flops()


def test_causal_attention_counts_the_pairs_that_a_token_may_see() -> None:
    pairs = sum(1 for query in range(SEQ) for key in range(SEQ) if key <= query)
    ours = forward_flops(our_shape(), lengths=[SEQ])
    assert ours.scores == LAYERS * 2 * pairs * HIDDEN


@settings(deadline=None, max_examples=30)
@given(lengths=st.lists(st.integers(1, 40), min_size=2, max_size=6), cut=st.integers(1, 5))
def test_operations_do_not_depend_on_how_the_batch_is_cut(lengths: list[int], cut: int) -> None:
    whole = training_flops(our_shape(), lengths=lengths)
    parts = (lengths[:cut], lengths[cut:])
    assert whole == sum(training_flops(our_shape(), lengths=part) for part in parts)


@settings(deadline=None, max_examples=30)
@given(prompt=st.integers(1, 30), response=st.integers(1, 30))
def test_decoding_costs_what_a_forward_pass_over_the_same_tokens_costs(
    prompt: int, response: int
) -> None:
    generated = generation_flops(our_shape(), prompt_lengths=[prompt], response_lengths=[response])
    forward = forward_flops(our_shape(), lengths=[prompt + response - 1], head_tokens=response)
    assert generated == forward.total


def deepspeed_chat_formula(*, factor: int, batch: int, seq: int, shape: TransformerShape) -> float:
    """24 f B s L h^2 (1 + s/(6h) + V/(16 L h)), as DeepSpeed-Chat prints its throughput from."""
    layers, hidden, vocab = shape.layers, shape.hidden, shape.outputs
    return (
        24 * factor * batch * seq * layers * hidden**2
        * (1 + seq / (6 * hidden) + vocab / (16 * layers * hidden))
    )  # fmt: skip


OPT_1_3B = TransformerShape(hidden=2048, ffn=8192, layers=24, embed_dim=2048, outputs=50272)


def test_f15_published_formula_is_ours_with_recomputation_and_dense_attention() -> None:
    ours = training_flops(
        OPT_1_3B,
        lengths=[512] * 8,
        attention=AttentionCost.DENSE,
        recomputation=Recomputation.LAYERS,
    )
    theirs = deepspeed_chat_formula(factor=4, batch=8, seq=512, shape=OPT_1_3B)
    assert theirs == pytest.approx(ours, rel=1e-12)


def test_f15_published_formula_misses_a_quarter_of_the_head_without_recomputation() -> None:
    batch, seq = 8, 512
    ours = training_flops(OPT_1_3B, lengths=[seq] * batch, attention=AttentionCost.DENSE)
    theirs = deepspeed_chat_formula(factor=3, batch=batch, seq=seq, shape=OPT_1_3B)
    head = 3 * 2 * batch * seq * OPT_1_3B.hidden * OPT_1_3B.outputs
    assert ours - theirs == pytest.approx(head / 4, rel=1e-9)


def test_f15_ppo_counts_every_phase_and_every_role() -> None:
    prompts, responses = [5, 9, 3], [4, 1, 7]
    actor, critic = our_shape(), our_shape(embed_dim=16, outputs=1)
    lengths = [9, 10, 10]
    ours = ppo_flops(
        actor=actor,
        critic=critic,
        prompt_lengths=prompts,
        response_lengths=responses,
        epochs=2,
    )
    roles = (actor, actor, critic, critic)  # actor, reference, critic, reward model
    assert ours.score == sum(forward_flops(role, lengths=lengths).total for role in roles)
    assert ours.train == 2 * sum(training_flops(role, lengths=lengths) for role in (actor, critic))
    assert ours.generate == generation_flops(
        actor, prompt_lengths=prompts, response_lengths=responses
    )
    assert ours.total == ours.generate + ours.score + ours.train


def test_f15_throughput_of_a_device_does_not_fall_with_the_number_of_devices() -> None:
    """DeepSpeed-Chat divided the work of one device by the number of devices."""
    one = training_flops(our_shape(), lengths=[SEQ] * BATCH)
    eight = training_flops(our_shape(), lengths=[SEQ] * BATCH * 8)
    alone = teraflops_per_device(one, seconds=0.5, devices=1)
    assert teraflops_per_device(eight, seconds=0.5, devices=8) == pytest.approx(alone)
    assert alone == pytest.approx(one / 0.5 / 1e12)


@pytest.mark.parametrize("embed_dim", [HIDDEN, 16])
def test_matmul_parameters_are_the_two_dimensional_weights_of_the_model(embed_dim: int) -> None:
    model = OPTForCausalLM(opt_config(embed_dim=embed_dim))
    weights = sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.dim() == 2 and "embed_positions" not in name
    )  # the tied embedding appears once, as the head
    assert our_shape(embed_dim=embed_dim).matmul_parameters == weights


def test_decoding_reads_the_weights_once_a_step_and_the_cache_of_each_row() -> None:
    prompts, responses = [3, 5], [4, 2]
    ours = decode_bytes(
        our_shape(), prompt_lengths=prompts, response_lengths=responses, bytes_per_value=2
    )
    # Row 0 decodes 3 tokens, attending to 4, 5 and 6; row 1 decodes one, attending to 6.
    assert ours.cache == (4 + 5 + 6 + 6) * 2 * HIDDEN * LAYERS * 2
    assert ours.weights == 3 * our_shape().matmul_parameters * 2
    assert ours.total == ours.cache + ours.weights


def test_lengths_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(ValueError, match="2 prompt lengths, but 1 response"):
        generation_flops(our_shape(), prompt_lengths=[1, 2], response_lengths=[1])
    with pytest.raises(ValueError, match="at least one token"):
        decode_bytes(our_shape(), prompt_lengths=[1], response_lengths=[0], bytes_per_value=2)
