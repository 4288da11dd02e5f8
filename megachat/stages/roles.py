"""The one place that turns a role's configuration into a model on this rank."""

from contextlib import suppress
from pathlib import Path

from megachat.api import load_models
from megachat.checkpoint.content import weights_state
from megachat.checkpoint.huggingface import MissingHead, read_config
from megachat.hub import local_folder
from megachat.model.config import Head, ModelOptions, OptConfig
from megachat.model.opt import OptModel
from megachat.parallel.rng import seed_for
from megachat.stages.config import RoleSection
from megachat.stages.context import RunContext


def opt_config(context: RunContext, role: RoleSection) -> OptConfig:
    """The architecture that a role starts from (not for `model = "sft"`).

    Raises:
        CheckpointError: The model's folder is not an OPT.
        ConfigError: The shape describes no transformer.
    """
    if role.shape is None:
        assert role.model is not None, "a role has a model or a shape"
        return read_config(local_folder(role.model))
    tokenizer = context.tokenizer
    return role.shape.opt_config(
        vocab_size=tokenizer.vocab_size,
        pad_id=tokenizer.pad_id,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
    )


def start_model(
    context: RunContext, role: RoleSection, *, head: Head, options: ModelOptions
) -> OptModel:
    """A model with the weights that a role starts training from."""
    if role.shape is None:
        assert role.model is not None, "a role has a model or a shape"
        return load_model(
            context,
            role,
            local_folder(role.model),
            head=head,
            options=options,
            missing_head=MissingHead.INITIALISE,
        )
    return OptModel(
        opt_config(context, role),
        groups=context.groups(role),
        head=head,
        options=options,
        seed=seed_for(context.config.run.seed, "init", head),
    ).to(context.worker.device)


def load_model(
    context: RunContext,
    role: RoleSection,
    folder: Path,
    *,
    head: Head,
    options: ModelOptions,
    missing_head: MissingHead = MissingHead.REFUSE,
) -> OptModel:
    """A model with the weights of a HuggingFace folder, cut for a role's layout.

    A collective call of all ranks.

    Args:
        context: Of the run.
        role: Its layout.
        folder: A language model or a scored one.
        head: What the model computes.
        options: How it runs.
        missing_head: Whether a scalar head that the folder lacks starts at random.

    Raises:
        CheckpointError: The folder is not a complete OPT.
        ConfigError: The tokenizer has ids that the model has no embedding for.
    """
    state = None
    if context.worker.rank == 0:
        with suppress(OSError):  # loading tells all ranks of it
            state = weights_state(folder)
    loaded = load_models(
        folder,
        groups=context.groups(role),
        head=head,
        options=(options,),
        tokenizer=context.tokenizer,
        device=context.worker.device,
        missing_head=missing_head,
        seed=seed_for(context.config.run.seed, "init", head),
    )
    if state is not None and loaded.digest is not None:
        context.note_model(folder, loaded.digest, state=state)
    [model] = loaded.models
    return model
