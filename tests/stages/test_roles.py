"""From a role's configuration to a model on this rank."""

from pathlib import Path

import pytest
import torch

from megachat.checkpoint.huggingface import MissingHead, read_config
from megachat.config import build_config
from megachat.data.config import Stage
from megachat.errors import CheckpointError, ConfigError, MegachatError
from megachat.model.config import Head
from megachat.stages.config import RoleSection, RunConfig
from megachat.stages.context import RunContext
from megachat.stages.roles import load_model, opt_config, start_model
from tests.harness import run_ranks
from tests.stages import tiny_run


def test_roles_become_models(finished_folder: Path) -> None:
    run_ranks(2, _check_roles, finished_folder)


def _check_roles(folder: Path) -> None:
    settings = tiny_run.config(folder, ["launch.processes=2"])
    context = tiny_run.context(settings)
    _check_random_start(context)
    _check_folder_start(context)
    _check_missing_head(context)
    _check_small_vocabulary(context)


def _check_random_start(context: RunContext) -> None:
    """A shape gives the same weights under every layout, by the run's seed and the head."""
    role = context.config.models.actor
    config = opt_config(context, role)
    assert config.vocab_size == context.tokenizer.vocab_size == 134
    assert (config.pad_id, config.eos_id) == (context.tokenizer.pad_id, context.tokenizer.eos_id)
    options = role.options()
    whole = start_model(context, role, head=Head.LANGUAGE_MODEL, options=options)
    cut = role.model_copy(update={"tensor": 2})
    part = start_model(context, cut, head=Head.LANGUAGE_MODEL, options=cut.options())
    weights, shards = whole.parameters_by_spec(), part.parameters_by_spec()
    for spec in part.local_specs().values():
        expected = weights[spec.name][part.local_slices(spec)]
        assert torch.equal(shards[spec.name], expected), spec.name
    scored = start_model(context, role, head=Head.SCALAR, options=options).parameters_by_spec()
    assert not torch.equal(scored["layers.0.fc1.weight"], weights["layers.0.fc1.weight"])


def _check_folder_start(context: RunContext) -> None:
    """A model folder gives its architecture and weights."""
    folder = context.model_folder(Stage.SFT)
    role = RoleSection(model=str(folder), precision="fp32")
    assert opt_config(context, role) == read_config(folder)
    started = start_model(context, role, head=Head.LANGUAGE_MODEL, options=role.options())
    loaded = load_model(context, role, folder, head=Head.LANGUAGE_MODEL, options=role.options())
    for name, parameter in started.parameters_by_spec().items():
        assert torch.equal(parameter, loaded.parameters_by_spec()[name]), name


def _check_missing_head(context: RunContext) -> None:
    """Only a reward model that is to be trained may start without a head."""
    role, folder = context.config.models.reward, context.model_folder(Stage.SFT)
    options = role.options()
    error = _refusal(lambda: load_model(context, role, folder, head=Head.SCALAR, options=options))
    assert isinstance(error, CheckpointError) and "score.weight is missing" in str(error)
    models = [
        load_model(
            context,
            role,
            folder,
            head=Head.SCALAR,
            options=options,
            missing_head=MissingHead.INITIALISE,
        )
        for _ in range(2)
    ]
    first, second = (model.parameters_by_spec()["head.score.weight"] for model in models)
    assert torch.equal(first, second) and first.abs().max() > 0


def _check_small_vocabulary(context: RunContext) -> None:
    """A model with fewer embedding rows than the tokenizer has ids would index past its table."""
    folder = context.config.run.output.parent / f"small-{context.worker.rank}"
    folder.mkdir(exist_ok=True)
    text = (context.model_folder(Stage.SFT) / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"vocab_size": 134', '"vocab_size": 133'))
    role = RoleSection(model=str(folder))
    error = _refusal(lambda: start_model(context, role, head=Head.SCALAR, options=role.options()))
    assert isinstance(error, ConfigError) and "\n" not in str(error)
    assert "vocab_size is 133, but the run's tokenizer has 134 ids" in str(error)


def _refusal(call: object) -> MegachatError:
    with pytest.raises(MegachatError) as caught:
        call()
    return caught.value


def test_a_folder_that_is_not_there_is_refused(finished: RunConfig) -> None:
    role = build_config(RoleSection, {"model": "./nowhere"}, source="test")
    context = RunContext(config=finished, worker=None, tokenizer=None)
    with pytest.raises(CheckpointError, match="./nowhere: no such folder"):
        opt_config(context, role)
