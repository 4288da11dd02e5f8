"""Things that exactly one place may touch."""

from collections.abc import Iterable, Mapping

import pytest

from tests.conventions.source import (
    SourceFile,
    assert_none,
    imports_of,
    mentions_of,
    project_files,
    snippet,
)

LAUNCH = "megachat/parallel/launch.py"
OPENMP = "megachat/parallel/openmp.py"
GROUPS = "megachat/parallel/groups.py"
COLLECTIVES = "megachat/parallel/collectives.py"
COMPAT = "megachat/parallel/cpu_compat.py"
LAYERS = "megachat/model/layers.py"
ENGINE = "megachat/training/engine.py"
ZERO = "megachat/training/zero1.py"
TOKENIZER = "megachat/data/tokenizer.py"

PACKAGE_HOMES: Mapping[str, frozenset[str]] = {
    "megatron": frozenset({LAYERS, COMPAT}),
    "megatron.core.pipeline_parallel": frozenset({ENGINE, COMPAT}),
    "megatron.core.enums": frozenset({ENGINE, LAYERS}),
    "megatron.core.process_groups_config": frozenset({GROUPS, COMPAT}),
    "transformer_engine": frozenset({LAYERS}),
    "apex": frozenset({LAYERS}),
    "deepspeed": frozenset({ZERO, COMPAT}),
    "sentencepiece": frozenset({TOKENIZER}),
    "tokenizers": frozenset({TOKENIZER}),
    "transformers": frozenset({TOKENIZER}),
    "matplotlib": frozenset({"megachat/telemetry/charts.py"}),
}
"""Where a package may be imported; the longest entry that fits an import decides."""

COLLECTIVE_CALLS = (
    "all_gather",
    "all_gather_coalesced",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_gather_single",
    "all_reduce",
    "all_reduce_coalesced",
    "all_to_all",
    "all_to_all_single",
    "barrier",
    "batch_isend_irecv",
    "broadcast",
    "broadcast_object_list",
    "gather",
    "gather_object",
    "irecv",
    "isend",
    "monitored_barrier",
    "recv",
    "recv_object_list",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "scatter",
    "scatter_object_list",
    "send",
    "send_object_list",
)

NAME_HOMES: Mapping[str, frozenset[str]] = {
    "os.environ": frozenset({LAUNCH, OPENMP}),
    "os.environb": frozenset({LAUNCH}),
    "os.getenv": frozenset({LAUNCH}),
    "os.putenv": frozenset({LAUNCH}),
    "os.unsetenv": frozenset({LAUNCH}),
    "torch.cuda.is_available": frozenset({LAUNCH, COMPAT}),
    "torch.distributed.new_group": frozenset({GROUPS}),
    "torch.distributed.new_subgroups": frozenset({GROUPS}),
    "torch.distributed.init_device_mesh": frozenset({GROUPS}),
    **{f"torch.distributed.{call}": frozenset({COLLECTIVES}) for call in COLLECTIVE_CALLS},
}
"""Where a name may be used, whatever the file's imports call it."""

GROUP_GLOBALS = "megatron.core.parallel_state.get_"
"""Megatron's process-wide groups: with two layouts alive they are the wrong ones."""


def complaints_about_packages(files: Iterable[SourceFile]) -> list[str]:
    """Imports of a package outside its home."""
    complaints = []
    for file in files:
        for mention in imports_of(file):
            fitting = [name for name in PACKAGE_HOMES if _is_below(mention.name, name)]
            if fitting and file.path not in PACKAGE_HOMES[max(fitting, key=len)]:
                homes = ", ".join(sorted(PACKAGE_HOMES[max(fitting, key=len)]))
                complaints.append(
                    f"{file.path}:{mention.line}: {mention.name} may be imported only in {homes}"
                )
    return complaints


def complaints_about_names(files: Iterable[SourceFile]) -> list[str]:
    """Uses of a name outside its home."""
    complaints = []
    for file in files:
        for mention in mentions_of(file):
            for name, homes in NAME_HOMES.items():
                if _is_below(mention.name, name) and file.path not in homes:
                    where = ", ".join(sorted(homes))
                    complaints.append(f"{file.path}:{mention.line}: {name} belongs in {where}")
            if mention.name.startswith(GROUP_GLOBALS) and "/parallel/" not in file.path:
                complaints.append(
                    f"{file.path}:{mention.line}: {mention.name} reads a global group; pass "
                    "ProcessGroups instead"
                )
    return complaints


def _is_below(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")


def test_packages_are_imported_only_in_their_homes() -> None:
    assert_none(complaints_about_packages(project_files()))


def test_names_are_used_only_in_their_homes() -> None:
    assert_none(complaints_about_names(project_files()))


@pytest.mark.parametrize(
    "text",
    [
        "import deepspeed",
        "from deepspeed.runtime import engine",
        "def f():\n    import sentencepiece as spm",
        "from transformers import AutoTokenizer",
        "try:\n    import transformer_engine.pytorch\nexcept ImportError:\n    pass",
        "from megatron.core.transformer.mlp import MLP",
        "from megatron.core import pipeline_parallel",
        "import matplotlib.pyplot as plt",
    ],
)
def test_an_import_outside_its_home_is_found(text: str) -> None:
    assert len(complaints_about_packages([snippet(text)])) == 1


def test_layers_may_not_import_schedules() -> None:
    text = "from megatron.core.pipeline_parallel.schedules import get_forward_backward_func"
    assert len(complaints_about_packages([snippet(text, path=LAYERS)])) == 1
    assert complaints_about_packages([snippet(text, path=ENGINE)]) == []


@pytest.mark.parametrize(
    "text",
    [
        "import os\nx = os.environ['HOME']",
        "import os as system\nx = system.getenv('HOME')",
        "from os import environ",
        "import torch\nflag = torch.cuda.is_available()",
        "import torch\ntorch.distributed.all_reduce(x)",
        "import torch.distributed as dist\ndist.new_group([0])",
        "from torch import distributed\nwork = distributed.isend(x, 1).wait()",
        "import torch.distributed as dist\ncall = dist.barrier",
        "from megatron.core import parallel_state\n"
        "parallel_state.get_tensor_model_parallel_group()",
    ],
)
def test_a_use_outside_its_home_is_found(text: str) -> None:
    assert len(complaints_about_names([snippet(text)])) == 1


@pytest.mark.parametrize(
    "text",
    [
        "import os\nx = os.environment",
        "import torch.distributed as dist\nx = dist.get_world_size(group)",
        "from megachat.parallel.collectives import barrier\nbarrier()",
        "counter.reduce(x)\nsocket.send(y)",
    ],
)
def test_names_that_only_look_alike_are_accepted(text: str) -> None:
    assert complaints_about_names([snippet(text)]) == []
