import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from megachat.errors import CapacityError, ConfigError, LayoutError
from megachat.model import OPT_MODELS, Head, ModelOptions, OptConfig, Recompute
from megachat.model.dropout import dropout_mask
from megachat.model.opt import OptModel
from megachat.parallel.collectives import all_gather_last_dim, all_gather_rows, all_reduce_sum
from megachat.parallel.groups import ProcessGroups
from megachat.parallel.layout import ParallelLayout
from megachat.parallel.rng import seed_for
from tests.harness import run_ranks
from tests.model import reference as ref

TOLERANCE = 1e-5
"""Relative, fp32: sums over hidden and vocabulary in another order."""

WORLD_OF_FOUR: tuple[tuple[dict[str, int], dict[str, Any]], ...] = (
    ({"tensor": 1, "pipeline": 1}, {}),
    ({"tensor": 2, "pipeline": 1}, {}),
    ({"tensor": 1, "pipeline": 2}, {}),
    ({"tensor": 2, "pipeline": 2}, {}),
    ({"tensor": 2, "pipeline": 2}, {"sequence_parallel": True}),
    ({"tensor": 4, "pipeline": 1}, {"sequence_parallel": True}),
    ({"tensor": 1, "pipeline": 4}, {"recompute": Recompute.FULL}),
    ({"tensor": 2, "pipeline": 2}, {"sequence_parallel": True, "recompute": Recompute.FULL}),
)


def _expected(
    model: nn.Module, config: OptConfig, batches: list[Tensor], head: Head
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """HuggingFace's outputs of each micro-batch, and gradients of the mean loss."""
    model.zero_grad()
    outputs = []
    for batch in batches:
        if head is Head.LANGUAGE_MODEL:
            output = model(input_ids=batch[:, : ref.SEQ]).logits
            loss = ref.token_loss(output, batch)
        else:
            hidden = model.model(input_ids=batch[:, : ref.SEQ]).last_hidden_state
            output = model.score(hidden).squeeze(-1)
            loss = ref.score_loss(output, batch)
        outputs.append(output.detach())
        (loss / len(batches)).backward()
    gradients = {
        name: parameter.grad for name, parameter in model.named_parameters(remove_duplicate=False)
    }
    return outputs, ref.by_spec_name(gradients, config)


def _output_error(found: list[tuple[Tensor, Tensor]], expected: list[Tensor]) -> float:
    """Largest relative error of the outputs; 0 where this rank has none."""
    if not found:
        return 0.0
    pairs = zip(found, expected, strict=True)
    return max(ref.relative_error(output, wanted) for (output, _), wanted in pairs)


def _compare_with_huggingface(config: OptConfig, head: Head) -> list[tuple[str, float, float, str]]:
    hf = ref.huggingface_model(config, head)
    batches = ref.random_batches(config, 3)
    outputs, gradients = _expected(hf, config, batches, head)
    loss = ref.token_loss if head is Head.LANGUAGE_MODEL else ref.score_loss
    rows = []
    for degrees, options in WORLD_OF_FOUR:
        layout = ParallelLayout.for_world(4, **degrees)
        model = ref.build_model(config, layout, head=head, reference=hf, **options)
        found = ref.run(model, batches, loss)
        error, where = ref.gradient_error(model, gradients)
        rows.append((f"{layout} {options}", _output_error(found, outputs), error, where))
    return rows


@pytest.mark.parametrize("config", [ref.PRE_LN, ref.POST_LN], ids=["pre_ln", "post_ln"])
@pytest.mark.parametrize("head", list(Head))
def test_outputs_and_gradients_equal_huggingface_under_every_layout(
    config: OptConfig, head: Head
) -> None:
    for rank, rows in enumerate(run_ranks(4, _compare_with_huggingface, config, head)):
        for case, output_error, gradient_error, where in rows:
            assert output_error <= TOLERANCE, f"rank {rank}: {case}"
            assert gradient_error <= TOLERANCE, f"rank {rank}: {case}: {where}"


def _compare_with_data_ranks(config: OptConfig) -> tuple[float, str]:
    hf = ref.huggingface_model(config)
    batches = ref.random_batches(config, 4)
    _, gradients = _expected(hf, config, batches, Head.LANGUAGE_MODEL)
    model = ref.build_model(config, ParallelLayout(tensor=2, pipeline=2, data=2), reference=hf)
    ref.run(model, batches[model.groups.coordinate.data :: 2])
    for parameter in model.parameters():
        all_reduce_sum(parameter.grad.div_(2), model.groups.data)
    return ref.gradient_error(model, gradients)


def test_gradients_of_eight_ranks_on_all_three_axes_equal_huggingface() -> None:
    for error, where in run_ranks(8, _compare_with_data_ranks, ref.POST_LN):
        assert error <= TOLERANCE, where


BF16_UNIT = 2.0**-8
"""Distance of bf16 numbers next to 1: 8 significant bits."""


def _distance(found: list[Tensor], expected: list[Tensor]) -> float:
    """Norm of all differences over the norm of all expected values."""
    pairs = list(zip(found, expected, strict=True))
    difference = sum((a.float() - b.float()).square().sum().item() for a, b in pairs)
    return (difference / sum(b.float().square().sum().item() for _, b in pairs)) ** 0.5


def _compare_bf16(config: OptConfig) -> list[tuple[float, float, float]]:
    """(logits, gradients, HuggingFace's own gradients in bf16) against fp32, same weights."""
    hf = ref.huggingface_model(config)
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.copy_(parameter.bfloat16())
    batches = ref.random_batches(config, 2)
    outputs, gradients = _expected(hf, config, batches, Head.LANGUAGE_MODEL)
    theirs = ref.huggingface_model(config)
    theirs.load_state_dict(hf.state_dict())
    _, rounded = _expected(theirs.bfloat16(), config, batches, Head.LANGUAGE_MODEL)
    their_distance = _distance(list(rounded.values()), list(gradients.values()))
    rows = []
    for sequence_parallel in (False, True):
        model = ref.build_model(
            config,
            ParallelLayout.for_world(4, tensor=2, pipeline=2),
            reference=hf,
            dtype=torch.bfloat16,
            sequence_parallel=sequence_parallel,
        )
        found = ref.run(model, batches)
        named, specs = dict(model.named_parameters()), model.local_specs()
        own = [ref.own_part(model, name, gradients[specs[name].name]) for name in named]
        rows.append(
            (
                _distance([output for output, _ in found], outputs) if found else 0.0,
                _distance([parameter.grad for parameter in named.values()], own),
                their_distance,
            )
        )
    return rows


@pytest.mark.parametrize("config", [ref.PRE_LN, ref.POST_LN], ids=["pre_ln", "post_ln"])
def test_bf16_stays_within_round_off_of_fp32(config: OptConfig) -> None:
    """Logits to a few units; gradients as close as HuggingFace's own (flipped ReLUs dominate)."""
    for rows in run_ranks(4, _compare_bf16, config):
        for logits, gradients, their_gradients in rows:
            assert logits <= 4 * BF16_UNIT
            assert gradients <= 2 * their_gradients


def _gathered(model: OptModel) -> dict[str, str]:
    """A hash of each whole parameter of this stage, without padding."""
    hashes = {}
    for name, parameter in model.named_parameters():
        spec, whole = model.local_specs()[name], parameter.detach()
        if spec.shard_dim == 0:
            whole = all_gather_rows(whole, model.groups.tensor)
        elif spec.shard_dim == 1:
            whole = all_gather_last_dim(whole, model.groups.tensor)
        rows = whole[: spec.unpadded_shape[0]].contiguous().numpy().tobytes()
        hashes[spec.name] = hashlib.sha256(rows).hexdigest()
        assert not whole[spec.unpadded_shape[0] :].any()
    return hashes


def _hash_initial_weights() -> dict[str, list[dict[str, str]]]:
    layouts: tuple[dict[str, int], ...] = (
        {},
        {"tensor": 2},
        {"tensor": 4},
        {"tensor": 2, "pipeline": 2},
        {"pipeline": 4},
    )
    return {
        f"{config.layer_norm_first} {head}": [
            _gathered(
                ref.build_model(config, ParallelLayout.for_world(4, **degrees), head=head, seed=5)
            )
            for degrees in layouts
        ]
        for config in (ref.PRE_LN, ref.POST_LN)
        for head in Head
    }


def test_random_start_is_equal_for_every_layout() -> None:
    ranks = run_ranks(4, _hash_initial_weights)
    for kind, (whole, *_) in ranks[0].items():
        for case in range(len(ranks[0][kind])):
            union: dict[str, str] = {}
            for rank in ranks:
                for name, value in rank[kind][case].items():
                    assert whole[name] == value, f"{kind} case {case}: {name}"
                union |= rank[kind][case]
            assert union == whole


KEYS = (101, 202, 303)


def _run_with_dropout(
    config: OptConfig, cases: list[tuple[dict[str, int], dict[str, Any]]]
) -> list[tuple[list[float], dict[str, Tensor]]]:
    batches = ref.random_batches(config, len(KEYS))
    results = []
    for degrees, options in cases:
        layout = ParallelLayout.for_world(4, **degrees)
        model = ref.build_model(
            config, layout, seed=3, hidden_dropout=0.1, attention_dropout=0.1, **options
        )
        losses = [loss.item() for _, loss in ref.run(model, batches, keys=KEYS)]
        specs = model.local_specs()
        rank = model.groups.coordinate.tensor
        gradients = {
            f"{specs[name].name} {rank if specs[name].shard_dim is not None else 0}": value.grad
            for name, value in model.named_parameters()
        }
        results.append((losses, gradients))
    return results


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["whole", "sequence_shards"])
def test_dropout_repeats_whatever_the_pipeline_cut_and_with_recomputation(
    sequence_parallel: bool,
) -> None:
    options: dict[str, Any] = {"sequence_parallel": sequence_parallel}
    cases: list[tuple[dict[str, int], dict[str, Any]]] = [
        ({"tensor": 2}, options),
        ({"tensor": 2, "pipeline": 2}, options),
        ({"tensor": 2}, options | {"recompute": Recompute.FULL}),
        ({"tensor": 2, "pipeline": 2}, options | {"recompute": Recompute.FULL}),
    ]
    ranks = run_ranks(4, _run_with_dropout, ref.POST_LN, cases)
    losses = [[rank[case][0] for rank in ranks if rank[case][0]] for case in range(len(cases))]
    gradients = [
        {name: value for rank in ranks for name, value in rank[case][1].items()}
        for case in range(len(cases))
    ]
    assert len(set(losses[0][0])) == len(KEYS)
    for case in range(1, len(cases)):
        assert all(found == losses[0][0] for found in losses[case]), cases[case]
        assert gradients[case].keys() == gradients[0].keys()
        for name, value in gradients[case].items():
            # The tied embedding sums its two uses in another order when cut.
            assert ref.relative_error(value, gradients[0][name]) <= 1e-6, (cases[case], name)


@contextmanager
def _functional_dropout(masks: Iterator[Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Replaces torch's dropout by the next of `masks`."""
    original = nn.functional.dropout
    nn.functional.dropout = lambda x, p, training: next(masks)(x)
    try:
        yield
    finally:
        nn.functional.dropout = original


def _compare_dropout_with_huggingface() -> tuple[float, float, bool, bool]:
    config, key, batch = ref.PRE_LN, 77, ref.random_batches(ref.PRE_LN, 1)[0]
    hf = ref.huggingface_model(config).train()

    def mask(site: str, layer: int) -> Callable[[Tensor], Tensor]:
        seed = seed_for(key, site, layer, 0)

        def apply(x: Tensor) -> Tensor:
            like = torch.empty(ref.ROWS * ref.SEQ, 1, config.hidden)
            return x * dropout_mask(like, probability=0.2, seed=seed).view(x.shape)

        return apply

    sites = (mask(site, n) for n in range(1, config.layers + 1) for site in ("attention", "mlp"))
    with _functional_dropout(sites):
        expected = hf(input_ids=batch[:, : ref.SEQ]).logits.detach()
    model = ref.build_model(config, ParallelLayout(), reference=hf, hidden_dropout=0.2)
    tokens = batch[:, : ref.SEQ]
    model.set_dropout_key(key)
    found = model(tokens).detach()[..., : config.vocab_size]
    plain = model.eval()(tokens).detach()[..., : config.vocab_size]
    model.train().set_dropout_key(key + 1)
    other = model(tokens).detach()[..., : config.vocab_size]
    reference = hf.eval()(input_ids=tokens).logits.detach()
    return (
        ref.relative_error(found, expected),
        ref.relative_error(plain, reference),
        torch.equal(found, other),
        torch.equal(found, plain),
    )


def test_dropout_acts_where_huggingface_has_it_and_only_while_training() -> None:
    [(with_masks, without, other_key_same, eval_same)] = run_ranks(
        1, _compare_dropout_with_huggingface
    )
    assert with_masks <= TOLERANCE
    assert without <= TOLERANCE
    assert not other_key_same
    assert not eval_same


def _message(kind: type[Exception], action: Callable[[], Any]) -> str:
    with pytest.raises(kind) as caught:
        action()
    return str(caught.value)


def _collect_refusals() -> list[str]:
    layout = ParallelLayout(tensor=2)
    model = ref.build_model(ref.PRE_LN, layout, seed=0, sequence_parallel=True, hidden_dropout=0.1)
    groups = model.groups
    uneven = OptConfig(hidden=32, ffn=48, layers=3, heads=4, embed_dim=32)
    pipeline = ProcessGroups.create(ParallelLayout(pipeline=2))
    options = ModelOptions()

    def build(config: OptConfig, on: ProcessGroups) -> OptModel:
        return OptModel(config, groups=on, head=Head.SCALAR, options=options, seed=None)

    odd_heads = OptConfig(hidden=33, ffn=48, layers=4, heads=3, embed_dim=33)
    tokens = torch.zeros(1, 21, dtype=torch.int64)
    return [
        _message(CapacityError, lambda: model(tokens)),
        _message(LayoutError, lambda: model(tokens[:, :7])),
        _message(ConfigError, lambda: model(tokens[:, :8])),
        _message(LayoutError, lambda: build(uneven, pipeline)),
        _message(LayoutError, lambda: build(odd_heads, groups)),
    ]


def test_what_cannot_be_run_is_refused_with_the_numbers_on_both_sides() -> None:
    for messages in run_ranks(2, _collect_refusals):
        long, odd, keyless, layers, heads = messages
        assert "21 tokens" in long and "20 positions" in long
        assert "7 tokens over tensor degree 2" in odd
        assert "set_dropout_key" in keyless
        assert "layers 3" in layers and "pipeline degree 2" in layers
        assert "attention heads 3" in heads and "tensor degree 2" in heads


def _describe_parameters(head: Head, sequence_parallel: bool) -> dict[str, Any]:
    layout = ParallelLayout.for_world(4, tensor=2, pipeline=2)
    model = ref.build_model(
        ref.POST_LN, layout, head=head, seed=0, sequence_parallel=sequence_parallel
    )
    named, specs = dict(model.named_parameters()), model.local_specs()
    for name, value in named.items():
        assert tuple(value.shape) == specs[name].local_shape(2), name
        assert vars(value)["tensor_model_parallel"] == (specs[name].shard_dim is not None)
    layers = model.layer_weights()
    views = {f"layers.{weights.layer}.qkv.weight": weights.qkv_weight for weights in layers} | {
        f"layers.{weights.layer}.norm2.bias": weights.norm2_bias for weights in layers
    }
    by_spec = model.parameters_by_spec()
    assert all(by_spec[name] is value for name, value in views.items())
    embedding, output = model.embedding_weights(), model.output_weights()
    assert (embedding is not None) == model.groups.is_first_stage
    assert (output is not None) == model.groups.is_last_stage
    marks = {
        mark: sorted(specs[name].name for name, value in named.items() if vars(value)[mark])
        for mark in ("sequence_parallel", "shared_embedding", "ds_pipe_replicated")
    }
    return {
        "layers": [weights.layer for weights in layers],
        "tied": len(model.tied_parameters()),
        "reduced": len(model.tensor_reduced_parameters()),
        "has_words": output is not None and output.words is not None,
        "has_score": output is not None and output.score is not None,
        **marks,
    }


@pytest.mark.parametrize("head", list(Head))
def test_parameters_carry_what_engine_and_runner_ask_for(head: Head) -> None:
    first, _, last, _ = run_ranks(4, _describe_parameters, head, True)
    per_layer = [
        "fc2.bias",
        "norm1.bias",
        "norm1.weight",
        "norm2.bias",
        "norm2.weight",
        "proj.bias",
    ]
    own = [f"layers.{layer}.{name}" for layer in (0, 1) for name in per_layer]
    assert (first["layers"], last["layers"]) == ([0, 1], [2, 3])
    # Each rank applies these to its shard of the sequence; the embedding's see whole sequences.
    assert first["sequence_parallel"] == own
    head_names = {"head.project_out.weight"} | ({"head.score.weight"} & {head_name(head)})
    assert head_names <= set(last["sequence_parallel"])
    assert (first["reduced"], last["reduced"]) == (12, 12 + len(head_names))
    tied = ["embedding.word.weight"] if head is Head.LANGUAGE_MODEL else []
    assert first["shared_embedding"] == last["shared_embedding"] == tied
    assert (first["ds_pipe_replicated"], last["ds_pipe_replicated"]) == ([], tied)
    assert first["tied"] == last["tied"] == len(tied)
    assert last["has_words"] == (head is Head.LANGUAGE_MODEL)
    assert last["has_score"] == (head is Head.SCALAR)


def head_name(head: Head) -> str:
    return "head.score.weight" if head is Head.SCALAR else ""


def _dry_run_175b() -> list[tuple[int, ...]]:
    """One of 64 ranks on fake tensors; the only process stands for all of them in turn."""
    dist.destroy_process_group()
    shapes: list[tuple[int, ...]] = []
    config = OPT_MODELS["facebook/opt-175b"]
    for rank, sequence_parallel in ((0, False), (27, True), (63, True)):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=64)
        groups = ProcessGroups.create(ParallelLayout(tensor=8, pipeline=8))
        with FakeTensorMode():
            model = OptModel(
                config,
                groups=groups,
                head=Head.LANGUAGE_MODEL,
                options=ModelOptions(
                    dtype=torch.bfloat16,
                    sequence_parallel=sequence_parallel,
                    recompute=Recompute.FULL,
                ),
                seed=None,
            )
            tokens = 2 * 512 // (8 if sequence_parallel else 1)
            hidden = torch.empty(tokens, 1, config.hidden, dtype=torch.bfloat16, requires_grad=True)
            model.set_input_tensor(hidden)
            out = model(torch.zeros(2, 512, dtype=torch.int64))
            out.float().sum().backward()
            shapes.append(tuple(out.shape))
            assert all(parameter.grad is not None for parameter in model.parameters())
        dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    return shapes


def test_any_rank_of_the_175b_model_builds_and_runs_on_fake_tensors() -> None:
    first, middle, last = run_ranks(1, _dry_run_175b)[0]
    assert first == (1024, 1, 12288)
    assert middle == (128, 1, 12288)
    assert last == (2, 512, OPT_MODELS["facebook/opt-175b"].padded_vocab(8) // 8)
