from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import OPTConfig as HuggingFaceConfig
from transformers import OPTForCausalLM

from megachat.errors import ConfigError, LayoutError
from megachat.model import OPT_MODELS, Head, ModelOptions, OptConfig
from megachat.parallel.layout import ParallelLayout
from tests.model.reference import POST_LN, PRE_LN


@pytest.mark.parametrize("name", OPT_MODELS)
def test_parameter_count_equals_that_of_transformers(name: str) -> None:
    config = OPT_MODELS[name]
    values = config.to_huggingface(head=Head.LANGUAGE_MODEL, dtype=torch.float16)
    with torch.device("meta"):
        model = OPTForCausalLM(HuggingFaceConfig(**values))
    assert config.num_parameters == sum(parameter.numel() for parameter in model.parameters())


def test_parameter_counts_are_the_published_ones() -> None:
    counts = {name.partition("-")[2]: c.num_parameters for name, c in OPT_MODELS.items()}
    assert counts["125m"] == 125_239_296
    assert counts["350m"] == 331_196_416
    assert counts["1.3b"] == 1_315_758_080
    assert counts["6.7b"] == 6_658_473_984
    assert round(counts["175b"] / 1e9, 1) == 174.6
    assert len(counts) == 9


def test_only_the_350m_size_is_post_ln_with_projections() -> None:
    odd = [name for name, c in OPT_MODELS.items() if c.has_projection or not c.layer_norm_first]
    assert odd == ["facebook/opt-350m"]


@pytest.mark.parametrize("config", [*OPT_MODELS.values(), PRE_LN, POST_LN])
@pytest.mark.parametrize("head", list(Head))
def test_huggingface_form_reads_back_as_the_same_config(config: OptConfig, head: Head) -> None:
    values = config.to_huggingface(head=head, dtype=torch.bfloat16)
    assert OptConfig.from_huggingface(values) == config
    assert OptConfig.from_huggingface(HuggingFaceConfig(**values).to_dict()) == config


def _published_350m() -> dict[str, Any]:
    """The entries of the hub's config.json that matter."""
    return {
        "_remove_final_layer_norm": False,
        "activation_function": "relu",
        "attention_dropout": 0.0,
        "bos_token_id": 2,
        "do_layer_norm_before": False,
        "dropout": 0.1,
        "eos_token_id": 2,
        "ffn_dim": 4096,
        "hidden_size": 1024,
        "init_std": 0.006,
        "max_position_embeddings": 2048,
        "model_type": "opt",
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "pad_token_id": 1,
        "torch_dtype": "float16",
        "vocab_size": 50272,
        "word_embed_proj_dim": 512,
    }


def test_a_config_as_on_the_hub_is_understood() -> None:
    assert OptConfig.from_huggingface(_published_350m()) == OPT_MODELS["facebook/opt-350m"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "gpt2"),
        ("activation_function", "gelu"),
        ("enable_bias", False),
        ("layer_norm_elementwise_affine", False),
        ("_remove_final_layer_norm", True),
        ("tie_word_embeddings", False),
        ("hidden_size", "1024"),
        ("hidden_size", True),
        ("num_hidden_layers", 0),
        ("num_attention_heads", 17),
        ("dropout", "high"),
        ("do_layer_norm_before", 1),
        ("eos_token_id", [2, 3]),
        ("vocab_size", None),
    ],
)
def test_a_variant_or_malformed_entry_is_refused_in_one_line(key: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        OptConfig.from_huggingface(_published_350m() | {key: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("values", [[], "opt", 3, None])
def test_a_file_that_holds_no_object_is_refused_in_one_line(values: Any) -> None:
    with pytest.raises(ConfigError, match="expected a JSON object"):
        OptConfig.from_huggingface(values)


def test_a_missing_entry_is_named() -> None:
    values = _published_350m()
    del values["ffn_dim"]
    with pytest.raises(ConfigError, match="ffn_dim"):
        OptConfig.from_huggingface(values)


@given(vocab=st.integers(1, 60_000), tensor=st.integers(1, 16))
def test_padded_vocabulary_is_the_least_that_cuts_into_aligned_parts(
    vocab: int, tensor: int
) -> None:
    config = OptConfig(vocab_size=vocab, hidden=8, ffn=8, layers=1, heads=2, embed_dim=8)
    padded = config.padded_vocab(tensor)
    assert padded % (128 * tensor) == 0
    assert vocab <= padded < vocab + 128 * tensor


def test_published_sizes_fit_the_layouts_of_a_64_gpu_cluster() -> None:
    layout = ParallelLayout(tensor=8, pipeline=8)
    for name in ("facebook/opt-13b", "facebook/opt-30b", "facebook/opt-66b", "facebook/opt-175b"):
        OPT_MODELS[name].validate_layout(layout)


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        (ParallelLayout(tensor=3), "attention heads 4 .* tensor degree 3"),
        (ParallelLayout(pipeline=3), "layers 4 .* pipeline degree 3"),
        (ParallelLayout(tensor=4, pipeline=8), "layers 4 .* pipeline degree 8"),
    ],
)
def test_a_layout_that_cuts_unevenly_is_refused_with_both_numbers(
    layout: ParallelLayout, words: str
) -> None:
    with pytest.raises(LayoutError, match=words):
        PRE_LN.validate_layout(layout)


@given(layers=st.integers(1, 8), pipeline=st.integers(1, 8))
def test_stages_hold_consecutive_layers_that_cover_the_model(layers: int, pipeline: int) -> None:
    config = OptConfig(hidden=8, ffn=8, layers=layers * pipeline, heads=2, embed_dim=8)
    stages = [config.layers_of_stage(stage, pipeline=pipeline) for stage in range(pipeline)]
    assert [layer for stage in stages for layer in stage] == list(range(config.layers))


@pytest.mark.parametrize(
    "options",
    [{"hidden_dropout": 1.0}, {"attention_dropout": -0.1}, {"dtype": torch.float64}],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        ModelOptions(**options)
