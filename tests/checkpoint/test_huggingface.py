import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from megachat.checkpoint import MissingHead, load_huggingface, read_config
from megachat.checkpoint.writer import is_complete, save_huggingface
from megachat.errors import CheckpointError, ConfigError, DivergenceError, MegachatError
from megachat.model import OPT_MODELS, Head, OptConfig
from megachat.parallel.layout import ParallelLayout
from tests.checkpoint import folders
from tests.harness import run_ranks
from tests.model import reference as ref

CONFIGS = {"pre": ref.PRE_LN, "post": ref.POST_LN}


def _load_and_compare(folder: Path) -> list[str]:
    """Loads every kind of folder under several layouts; what differs from the reference."""
    wrong = []
    for name, config in CONFIGS.items():
        weights = ref.by_spec_name(folders.state(config), config)
        for degrees in ({"tensor": 2, "pipeline": 2}, {"tensor": 4}, {"pipeline": 4}, {}):
            layout = ParallelLayout.for_world(4, **degrees)
            model = ref.build_model(config, layout)
            for kind in folders.KINDS:
                for parameter in model.parameters():
                    parameter.data.fill_(torch.nan)
                load_huggingface(model, folder / name / kind)
                for parameter_name, parameter in model.named_parameters():
                    spec = model.local_specs()[parameter_name]
                    expected = ref.own_part(model, parameter_name, weights[spec.name])
                    if not torch.equal(parameter, expected):
                        wrong.append(f"{name} {layout} {kind} {parameter_name}")
    return wrong


def test_every_kind_of_folder_loads_into_every_layout_bit_for_bit(tmp_path: Path) -> None:
    for name, config in CONFIGS.items():
        for kind in folders.KINDS:
            folders.write_folder(config, tmp_path / name / kind, kind)
    assert run_ranks(4, _load_and_compare, tmp_path) == [[]] * 4


def _load_across_heads(folder: Path) -> dict[str, Any]:
    """Scalar models from a language model's folder, and the reverse; weights in bf16."""
    layout = ParallelLayout.for_world(2, pipeline=2)
    scalar = ref.build_model(ref.POST_LN, layout, head=Head.SCALAR, dtype=torch.bfloat16)
    message = ""
    try:
        load_huggingface(scalar, folder / "lm")
    except CheckpointError as error:
        message = str(error)
    scores = []
    for seed in (1, 1, 2):
        load_huggingface(scalar, folder / "lm", missing_head=MissingHead.INITIALISE, seed=seed)
        score = scalar.parameters_by_spec().get("head.score.weight")
        scores.append(None if score is None else score.detach().clone())
    load_huggingface(scalar, folder / "scalar", missing_head=MissingHead.INITIALISE)
    score = scalar.parameters_by_spec().get("head.score.weight")
    language = ref.build_model(ref.POST_LN, layout)
    load_huggingface(language, folder / "scalar")
    words = language.parameters_by_spec()["embedding.word.weight"].detach()
    return {
        "message": message,
        "initialised": scores,
        "stored": None if score is None else score.detach(),
        "words": words[: ref.POST_LN.vocab_size],
    }


def test_a_scalar_head_is_initialised_only_where_the_caller_says_so(tmp_path: Path) -> None:
    folders.write_folder(ref.POST_LN, tmp_path / "lm")
    folders.write_folder(ref.POST_LN, tmp_path / "scalar", head=Head.SCALAR)
    first, last = run_ranks(2, _load_across_heads, tmp_path)
    for rank in (first, last):
        assert "score.weight is missing (1 of " in rank["message"]
    one, again, other = last["initialised"]
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert one.dtype is torch.bfloat16
    state = folders.state(ref.POST_LN, Head.SCALAR)
    assert torch.equal(last["stored"], state["score.weight"].bfloat16())
    for rank in (first, last):
        assert torch.equal(rank["words"], state["model.decoder.embed_tokens.weight"])


def _rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    state = folders.state(ref.PRE_LN)
    change(state)
    save_file(
        {name: value.contiguous() for name, value in state.items()}, folder / "model.safetensors"
    )


def _set_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


FC2 = "model.decoder.layers.3.fc2.weight"
WORDS = "model.decoder.embed_tokens.weight"
OUTPUT = "lm_head.weight"

BAD_FOLDERS: dict[str, tuple[Callable[[Path], object], type[MegachatError], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), CheckpointError, "config.json: missing"),
    "config is no JSON": (
        lambda f: (f / "config.json").write_text("{"),
        CheckpointError,
        "config.json: not valid JSON",
    ),
    "config of another family": (
        lambda f: _set_config(f, model_type="gpt2"),
        ConfigError,
        "config.json: model_type is 'gpt2'",
    ),
    "variant without biases": (
        lambda f: _set_config(f, enable_bias=False),
        ConfigError,
        "enable_bias is False",
    ),
    "more layers": (
        lambda f: _set_config(f, num_hidden_layers=8),
        CheckpointError,
        "layers is 8, but the model to load into has 4",
    ),
    "other heads": (
        lambda f: _set_config(f, num_attention_heads=2),
        CheckpointError,
        "heads is 2, but the model to load into has 4",
    ),
    "other place of norms": (
        lambda f: _set_config(f, do_layer_norm_before=False),
        CheckpointError,
        "layer_norm_first is False",
    ),
    "other vocabulary": (
        lambda f: _set_config(f, vocab_size=130),
        CheckpointError,
        "vocab_size is 130, but the model to load into has 131",
    ),
    "vocabulary of the file differs from its config": (
        lambda f: _rewrite(f, lambda s: s.update({WORDS: s[WORDS][:130]})),
        CheckpointError,
        rf"model.safetensors: {WORDS} has shape \[130, 32\], but the model needs \[131, 32\]",
    ),
    "missing tensor": (
        lambda f: _rewrite(f, lambda s: s.pop(FC2)),
        CheckpointError,
        rf"{FC2} is missing \(1 of ",
    ),
    "other shape": (
        lambda f: _rewrite(f, lambda s: s.update({FC2: s[FC2].t()})),
        CheckpointError,
        rf"model.safetensors: {FC2} has shape \[48, 32\], but the model needs \[32, 48\]",
    ),
    "surplus tensor": (
        lambda f: _rewrite(f, lambda s: s.update({"adapter.weight": torch.ones(2)})),
        CheckpointError,
        "adapter.weight is no tensor of this model",
    ),
    "whole numbers": (
        lambda f: _rewrite(f, lambda s: s.update({FC2: s[FC2].int()})),
        CheckpointError,
        f"{FC2} holds torch.int32",
    ),
    "output of its own in the config": (
        lambda f: _set_config(f, tie_word_embeddings=False),
        ConfigError,
        "tie_word_embeddings is False",
    ),
    "output of another shape": (
        lambda f: _rewrite(f, lambda s: s.update({OUTPUT: s[WORDS][:130].clone()})),
        CheckpointError,
        rf"{OUTPUT} has shape \[130, 32\], but the model needs \[131, 32\]",
    ),
    "no number in the config": (
        lambda f: _set_config(f, init_std=float("nan")),
        ConfigError,
        "init_std is nan: expected a number",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), CheckpointError, "no weights"),
}


def _refusals(root: Path) -> dict[str, tuple[str, str]]:
    layout = ParallelLayout.for_world(2, pipeline=2)
    model = ref.build_model(ref.PRE_LN, layout)
    found = {}
    for name in BAD_FOLDERS:
        try:
            load_huggingface(model, root / name)
        except MegachatError as error:
            found[name] = (type(error).__name__, str(error))
    return found


def test_bad_folders_are_refused_by_every_rank_alike(tmp_path: Path) -> None:
    for name, (spoil, _, _) in BAD_FOLDERS.items():
        spoil(folders.write_folder(ref.PRE_LN, tmp_path / name))
    first, last = run_ranks(2, _refusals, tmp_path)
    for name, (_, kind, words) in BAD_FOLDERS.items():
        assert name in last, f"{name} was accepted"
        assert last[name][0] == kind.__name__
        assert re.search(words, last[name][1]), last[name][1]
        assert "\n" not in last[name][1]
        assert first[name] == last[name]


def test_config_of_a_published_size_needs_no_folder() -> None:
    assert read_config("facebook/opt-125m") == OPT_MODELS["facebook/opt-125m"]


def test_an_unknown_name_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="known sizes are facebook/opt-125m"):
        read_config(tmp_path / "facebook" / "opt-1b")


def test_config_of_a_folder_is_read(tmp_path: Path) -> None:
    folders.write_config(ref.POST_LN, tmp_path)
    assert read_config(tmp_path) == ref.POST_LN


def _load_and_save(folder: Path, degrees: dict[str, int], config: OptConfig) -> None:
    model = ref.build_model(config, ParallelLayout(**degrees))
    load_huggingface(model, folder)
    save_huggingface(model, folder.with_name(f"{folder.name}+"))


@pytest.mark.parametrize("name", CONFIGS)
def test_weights_survive_a_way_over_two_layouts(tmp_path: Path, name: str) -> None:
    folder = folders.write_folder(CONFIGS[name], tmp_path / "model")
    run_ranks(4, _load_and_save, folder, {"tensor": 2, "pipeline": 2}, CONFIGS[name])
    run_ranks(1, _load_and_save, tmp_path / "model+", {}, CONFIGS[name])
    expected, found = folders.state(CONFIGS[name]), folders.read_folder(tmp_path / "model++")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def _outcomes(root: Path, names: Sequence[str], head: Head) -> dict[str, str]:
    """The errors of loading each folder; "" where it was loaded with the right weights."""
    found = {}
    weights = ref.by_spec_name(folders.state(ref.PRE_LN), ref.PRE_LN)
    model = ref.build_model(ref.PRE_LN, ParallelLayout.for_world(2, pipeline=2), head=head)
    for name in names:
        for parameter in model.parameters():
            parameter.data.zero_()
        try:
            load_huggingface(model, root / name, missing_head=MissingHead.INITIALISE)
        except CheckpointError as error:
            found[name] = str(error)
            continue
        specs = model.local_specs()
        found[name] = " ".join(
            parameter_name
            for parameter_name, parameter in model.named_parameters()
            if specs[parameter_name].name != "head.score.weight"
            and not torch.equal(
                parameter, ref.own_part(model, parameter_name, weights[specs[parameter_name].name])
            )
        )
    return found


def test_an_output_of_its_own_is_refused_in_every_kind_of_folder_and_equal_ones_are_not(
    tmp_path: Path,
) -> None:
    """The last number of the last row differs; a scalar head has no use for an output."""
    words = folders.state(ref.PRE_LN)[WORDS]
    other = words.clone()
    other[-1, -1] += 1e-6
    assert not torch.equal(other, words)
    outputs = {"equal": words, "wider": words.double(), "other": other}
    names = []
    for kind in folders.KINDS:
        for what, output in outputs.items():
            names.append(f"{kind} {what}")
            changes = {OUTPUT: output}
            folders.write_folder(ref.PRE_LN, tmp_path / names[-1], kind, changes=changes)
    for what, output in {"equal": words, "other": other}.items():
        names.append(f"transposed {what}")  # columns lie together, and so do rows of nothing
        state = {**folders.state(ref.PRE_LN), OUTPUT: output.t().contiguous().t()}
        folders.write_folder(ref.PRE_LN, tmp_path / names[-1], "bin")
        torch.save(state, tmp_path / names[-1] / "pytorch_model.bin")
    names.append("one storage")
    folders.write_folder(ref.PRE_LN, tmp_path / names[-1], "bin")
    state = folders.state(ref.PRE_LN)
    torch.save({**state, OUTPUT: state[WORDS]}, tmp_path / names[-1] / "pytorch_model.bin")
    first, last = run_ranks(2, _outcomes, tmp_path, names, Head.LANGUAGE_MODEL)
    assert first == last
    for name, outcome in first.items():
        if name.endswith("other"):
            words_name = WORDS.removeprefix("model.") if "prefix" in name else WORDS
            expected = f": {OUTPUT} differs from {words_name} in row 130: megachat implements OPT"
            assert expected in outcome, outcome
            assert str(tmp_path / name) in outcome and "\n" not in outcome
        else:
            assert outcome == "", name
    refused = [name for name in names if name.endswith("other")]
    assert set(run_ranks(2, _outcomes, tmp_path, refused, Head.SCALAR)[1].values()) == {""}


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_weight_that_is_no_number_is_refused_with_file_and_tensor(
    value: float, tmp_path: Path
) -> None:
    for kind in folders.KINDS:
        tensor = folders.state(ref.PRE_LN)[FC2]
        tensor[3, 4] = value
        folders.write_folder(ref.PRE_LN, tmp_path / kind, kind, changes={FC2: tensor})
    first, last = run_ranks(2, _outcomes, tmp_path, folders.KINDS, Head.LANGUAGE_MODEL)
    assert first == last
    for kind, outcome in first.items():
        name = FC2.removeprefix("model.") if kind == "bin without prefix" else FC2
        expected = f": {name} holds NaN or infinity (1 of {32 * 48} numbers): start from"
        assert expected in outcome and str(tmp_path / kind) in outcome, outcome


def _spoil_and_save(folder: Path) -> str:
    """The error of exporting a model of which one rank's part of one weight holds NaN."""
    model = ref.build_model(ref.PRE_LN, ParallelLayout.for_world(2, tensor=2))
    for parameter in model.parameters():
        parameter.data.zero_()
    save_huggingface(model, folder)
    if model.groups.coordinate.tensor == 1:
        model.parameters_by_spec()["layers.2.fc1.weight"].data[0, 0] = torch.nan
    with pytest.raises(DivergenceError) as refused:
        save_huggingface(model, folder, role="actor")
    return str(refused.value)


def test_a_model_with_nan_is_not_exported_and_the_old_export_stays(tmp_path: Path) -> None:
    messages = run_ranks(2, _spoil_and_save, tmp_path / "model")
    assert messages[0] == messages[1]
    expected = "the actor is not written: layers.2.fc1.weight holds NaN or infinity (1 parameters"
    assert messages[0].startswith(expected)
    assert is_complete(tmp_path / "model") and list(tmp_path.iterdir()) == [tmp_path / "model"]
