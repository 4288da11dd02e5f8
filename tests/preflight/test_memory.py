"""What a run would need, against what this machine or a stated one has."""

import json
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from megachat.cli.main import EXIT_CODE, app
from megachat.cli.presets import DeploymentType, paper_tree, tiny_example
from megachat.config import apply_override, build_config, load_config
from megachat.data.config import Stage
from megachat.errors import CapacityError, ConfigError, LayoutError
from megachat.hub import folder_on_disk
from megachat.model.config import OPT_MODELS, Head
from megachat.preflight import memory as memory_module
from megachat.preflight.memory import check_memory
from megachat.stages.config import RunConfig

ALL = list(Stage)
GB = 10**9


def run_config(tmp_path: Path, *overrides: str, actor: str = "facebook/opt-125m") -> RunConfig:
    """The paper's recipe on the CPU."""
    tree = paper_tree(actor, reward_model="facebook/opt-125m", deployment=DeploymentType.CPU)
    for override in (f"run.output={tmp_path}/out", *overrides):
        apply_override(tree, override)
    return build_config(RunConfig, tree, source="test")


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    return monkeypatch


def with_memory(patch: pytest.MonkeyPatch, num_bytes: int) -> None:
    """From now on this machine has so many bytes."""
    patch.setattr(memory_module, "available_bytes", lambda _: num_bytes)


def needed(patch: pytest.MonkeyPatch, config: RunConfig, stages: list[Stage]) -> float:
    """Smallest memory, in GB, with which a run is started."""
    low, high = 0.1, 500.0
    while high - low > 0.01:
        middle = (low + high) / 2
        with_memory(patch, int(middle * GB))
        try:
            check_memory(config, stages)
            high = middle
        except CapacityError:
            low = middle
    return high


@pytest.mark.parametrize("command", ["train", "sft", "reward", "rlhf"])
def test_a_run_that_cannot_fit_is_refused_in_one_line_and_leaves_nothing(
    tmp_path: Path, command: str
) -> None:
    tree = tmp_path / "run.toml"
    tree.write_text(f"""
[run]
output = "{tmp_path}/out"
[launch]
device = "cpu"
processes = 2
[[data.sources]]
name = "Dahoas/rm-static"
[models.actor]
model = "facebook/opt-175b"
[models.reward]
model = "facebook/opt-66b"
""")
    result = CliRunner().invoke(app, [command, "--config", str(tree)])
    assert result.exit_code == EXIT_CODE, result.output
    assert result.stderr.startswith("CapacityError: this run cannot fit: phase ")
    assert result.stderr.count("\n") == 1
    for part in (" GB on ranks 0-1, ", " GB are usable", "launch.memory_check"):
        assert part in result.stderr
    assert sorted(tmp_path.iterdir()) == [tree]


def test_the_switch_decides_between_refusal_warning_and_nothing(tmp_path: Path) -> None:
    large = "facebook/opt-175b"
    with pytest.raises(CapacityError, match="this run cannot fit"):
        check_memory(run_config(tmp_path, actor=large), ALL)
    cache = "rlhf.generation.kv_cache_gb=5"  # for one sequence
    warned = run_config(tmp_path, "launch.memory_check=warn", cache, actor=large)
    warning = check_memory(warned, ALL)
    assert warning is not None and warning.startswith("warning: this run cannot fit: phase ")
    unchecked = run_config(tmp_path, "launch.memory_check=off", cache, actor=large)
    assert check_memory(unchecked, ALL) is None


def test_the_tiny_example_fits_into_a_small_machine(
    memory: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with_memory(memory, 6 * GB)
    overrides = [f"run.output={tmp_path}"]  # in its own folder it may have been run already
    config = load_config(RunConfig, path=tiny_example(), overrides=overrides)
    assert check_memory(config, ALL) is None


def test_fine_tuning_needs_what_its_pools_take(memory: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """fp32 on one rank: weights, gradients and masters of 4 bytes a parameter, moments of 8.

    The rest are what a layer keeps (8 hidden states and an MLP's), the logits and their gradient.
    """
    config, model = run_config(tmp_path), OPT_MODELS["facebook/opt-125m"]
    pools = (4 + 4 + 4 + 8) * model.num_parameters / GB
    tokens = config.models.actor.micro_batch_rows * config.data.max_tokens
    layers = 12 * (8 * 768 + 3072)
    rest = 4 * tokens * (layers + 2 * model.vocab_size) / GB
    assert needed(memory, config, [Stage.SFT]) - 0.5 == pytest.approx(pools + rest, rel=0.02)


def test_each_stage_is_held_against_its_own_phases(
    memory: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = run_config(tmp_path)
    alone, ppo = (needed(memory, config, [stage]) for stage in (Stage.SFT, Stage.PROMPTS))
    assert ppo > 1.5 * alone
    assert needed(memory, config, ALL) == pytest.approx(ppo, abs=0.02)


@pytest.mark.parametrize(
    "smaller",
    [
        ["models.actor.precision=bf16"],
        ["models.actor.micro_batch_rows=1"],
        ["data.max_tokens=128", "data.max_prompt_tokens=64"],
        ["models.actor.recompute=full"],
    ],
)
def test_the_settings_of_the_run_count(
    memory: pytest.MonkeyPatch, tmp_path: Path, smaller: list[str]
) -> None:
    before = needed(memory, run_config(tmp_path), [Stage.SFT])
    assert needed(memory, run_config(tmp_path, *smaller), [Stage.SFT]) < 0.95 * before


def test_ranks_share_the_memory_of_a_machine(memory: pytest.MonkeyPatch, tmp_path: Path) -> None:
    one, two = run_config(tmp_path), run_config(tmp_path, "launch.processes=2")
    alone, both = (needed(memory, config, [Stage.SFT]) for config in (one, two))
    assert 1.3 * alone < both < 2.1 * alone


def test_lent_gradients_make_room_for_generation(
    memory: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = ["models.actor.precision=bf16", "rlhf.generation.kv_cache_gb=100",
                "rlhf.generation.max_sequences=1024", "rlhf.batch_prompts=1024",
                "rlhf.ppo.minibatches=32"]  # fmt: skip
    lending = run_config(tmp_path, *settings, "rlhf.memory.reuse_gradients=true")
    before = needed(memory, run_config(tmp_path, *settings), [Stage.PROMPTS])
    lent = 4 * OPT_MODELS["facebook/opt-125m"].num_parameters / GB
    assert needed(memory, lending, [Stage.PROMPTS]) == pytest.approx(before - lent, abs=0.03)


def test_a_cache_below_one_sequence_is_refused_before_the_first_stage(tmp_path: Path) -> None:
    """A sequence of 256 + 256 tokens of OPT-125M takes 18.9 MB in bf16, twice that in fp32."""
    config = run_config(tmp_path, "rlhf.generation.kv_cache_gb=0.03")
    assert check_memory(config, [Stage.SFT]) is None
    with pytest.raises(CapacityError, match=r"kv_cache_gb 0.03 holds 25 blocks .* needs 32"):
        check_memory(config, ALL)


@pytest.mark.parametrize("switch", ["warn", "off"])
def test_a_cache_of_no_use_is_refused_whatever_is_said_of_memory(
    tmp_path: Path, switch: str
) -> None:
    config = run_config(
        tmp_path, "rlhf.generation.kv_cache_gb=0.03", f"launch.memory_check={switch}"
    )
    with pytest.raises(CapacityError, match=r"kv_cache_gb 0.03 holds 25 blocks .* needs 32"):
        check_memory(config, ALL)


def test_a_model_is_known_from_its_folder(memory: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "opt"
    folder.mkdir()
    values = OPT_MODELS["facebook/opt-125m"].to_huggingface(
        head=Head.LANGUAGE_MODEL, dtype=torch.float32
    )
    (folder / "config.json").write_text(json.dumps(values))
    by_folder = run_config(tmp_path, actor=str(folder))
    assert needed(memory, by_folder, [Stage.SFT]) == pytest.approx(
        needed(memory, run_config(tmp_path), [Stage.SFT]), abs=0.02
    )


def test_a_model_that_is_not_here_is_left_to_the_run(tmp_path: Path) -> None:
    name = "nobody/no-such-opt"
    assert folder_on_disk(name) is None
    note = check_memory(run_config(tmp_path, actor=name), ALL)
    assert note is not None and name in note and "before it is downloaded" in note


def test_a_shape_takes_its_vocabulary_from_the_tokenizer(
    memory: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def small(*overrides: str) -> RunConfig:
        return load_config(
            RunConfig,
            path=tiny_example(),
            overrides=(f"run.output={tmp_path}/out", "models.actor.shape.hidden=1024", *overrides),
        )

    few, many = (
        needed(memory, small(f"tokenizer.train.vocab_size={size}"), [Stage.SFT])
        for size in (1000, 200_000)
    )
    assert many > 2 * few


def test_what_no_layout_can_cut_is_refused_before_the_launch(tmp_path: Path) -> None:
    uneven = run_config(tmp_path, "launch.processes=5", "models.actor.pipeline=5")
    with pytest.raises(LayoutError, match="layers 12"):
        check_memory(uneven, ALL)
    with pytest.raises(ConfigError, match="2048 positions"):
        check_memory(run_config(tmp_path, "data.max_tokens=4096"), ALL)


@pytest.mark.parametrize(
    ("gigabytes", "capability", "fits"),
    [(80, (8, 0), True), (80, (9, 0), True), (70, (8, 0), False)],
)
def test_the_recipe_passes_the_check_on_the_gpus_that_it_was_chosen_for(
    memory: pytest.MonkeyPatch,
    tmp_path: Path,
    gigabytes: int,
    capability: tuple[int, int],
    fits: bool,
) -> None:
    """OPT-175B on 64 GPUs, as each node's first process finds them."""
    tree = paper_tree(
        "facebook/opt-175b",
        reward_model="facebook/opt-350m",
        deployment=DeploymentType.MULTI_NODE,
    )
    for override in (f"run.output={tmp_path}", "launch.rendezvous=first:1"):
        apply_override(tree, override)
    config = build_config(RunConfig, tree, source="test")
    memory.setattr(memory_module, "select_device", lambda _: torch.device("cuda", 0))
    memory.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    memory.setattr(
        memory_module,
        "available_bytes",
        lambda device: (gigabytes if device.type == "cuda" else 1000) * GB,
    )
    if fits:
        assert check_memory(config, ALL) is None
    else:
        with pytest.raises(CapacityError, match="of 70.0 GB reserved: context"):
            check_memory(config, ALL)


def test_a_check_of_the_largest_run_takes_no_time(tmp_path: Path) -> None:
    config = run_config(
        tmp_path, "launch.processes=8", "launch.nodes=8", "launch.rendezvous=first:1",
        "models.actor.tensor=8", "models.actor.pipeline=8", "launch.memory_check=warn",
        actor="facebook/opt-175b",
    )  # fmt: skip
    before = time.process_time()
    assert check_memory(config, ALL) is not None
    assert time.process_time() - before < 2.0
