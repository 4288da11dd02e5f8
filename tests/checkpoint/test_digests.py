"""Digests of tensors and models: of content, and of all that decides what it means."""

import hashlib
from dataclasses import replace

import pytest
import torch

from megachat.checkpoint.digests import covers, model_digest, tensor_digest
from tests.model import reference as ref

MATRIX = torch.arange(6, dtype=torch.float32).reshape(2, 3)
TENSORS = {"model.decoder.a": "1", "score.weight": "2"}


@pytest.mark.parametrize(
    "value",
    [
        MATRIX,
        MATRIX.t(),
        MATRIX[:, 1:],
        MATRIX.bfloat16(),
        MATRIX.half(),
        torch.tensor(1.5),
        torch.empty(0, 4),
    ],
)
def test_a_digest_is_of_dtype_shape_and_values_however_they_lie(value: torch.Tensor) -> None:
    raw = b"".join(bytes(item.view(torch.uint8).tolist()) for item in value.reshape(-1, 1))
    text = f"{value.dtype} {list(value.shape)}\n".encode()
    assert tensor_digest(value) == hashlib.sha256(text + raw).hexdigest()
    assert tensor_digest(value.clone()) == tensor_digest(value)


def test_equal_bytes_of_another_kind_are_another_tensor() -> None:
    kinds = (MATRIX, MATRIX.view(torch.int32), MATRIX.reshape(3, 2), MATRIX.reshape(6))
    assert len({tensor_digest(value) for value in kinds}) == len(kinds)


def test_a_model_is_its_architecture_and_its_tensors_in_any_order() -> None:
    digest = model_digest(ref.PRE_LN, TENSORS)
    assert digest == model_digest(ref.PRE_LN, dict(reversed(TENSORS.items())))
    others = (
        model_digest(replace(ref.PRE_LN, heads=ref.PRE_LN.heads // 2), TENSORS),
        model_digest(ref.PRE_LN, TENSORS | {"score.weight": "3"}),
        model_digest(ref.PRE_LN, {"model.decoder.a": "1"}),
    )
    assert len({digest, *others}) == 4


def test_the_tied_output_and_marks_of_the_format_say_nothing_of_a_model() -> None:
    more = TENSORS | {"lm_head.weight": "4", "model.decoder.version": "5"}
    assert model_digest(ref.PRE_LN, more) == model_digest(ref.PRE_LN, TENSORS)
    assert covers(TENSORS, more)
    assert not covers({"score.weight": "2"}, TENSORS)
