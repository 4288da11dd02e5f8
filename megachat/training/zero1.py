"""The one importer of DeepSpeed: AdamW whose state is sharded over data ranks (ZeRO stage 1).

megatron-core's schedule runs the backward passes on the bare model; DeepSpeed contributes the
partitioned optimizer only. Its engine's own `backward` and `step` are never called, and gradients
are reduced over an explicit group here, because DeepSpeed's reduction asks a module-global `mpu`
for the group, and a job has several layouts. fp32 models train in fp32; bf16 models keep fp32
masters and accumulate gradients in fp32.
"""

import contextlib
import importlib
import io
import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megachat.errors import ConfigError
from megachat.parallel.collectives import all_reduce_sum
from megachat.parallel.groups import ProcessGroups
from megachat.training.schedules import OptimizerConfig

_BUCKET_ELEMENTS = 2**26
"""Elements that DeepSpeed reduces or gathers in one call: 256 MiB of fp32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepReport:
    """What one optimizer step did."""

    learning_rate: float
    gradient_norm: float
    """Global norm before clipping; not finite when the step was skipped."""
    skipped: bool
    """True when a gradient was not finite: weights and state are unchanged."""


class Zero1Optimizer:
    """AdamW under ZeRO-1 for the parameters of one model shard."""

    def __init__(
        self, model: nn.Module, *, groups: ProcessGroups, config: OptimizerConfig, decayed: set[str]
    ) -> None:
        """Shards the optimizer state over the data ranks; parameters become views of flat buffers.

        Args:
            model: Holds this rank's parameters, in float32 or bfloat16.
            groups: The layout's communicators.
            config: AdamW's constants.
            decayed: Names of the parameters that weight decay applies to.

        Raises:
            ConfigError: The parameters are neither all float32 nor all bfloat16.
        """
        named = [(name, parameter) for name, parameter in model.named_parameters()]
        dtypes = {parameter.dtype for _, parameter in named}
        if dtypes not in ({torch.float32}, {torch.bfloat16}):
            raise ConfigError(f"training needs one dtype of float32 and bfloat16, got {dtypes}")
        self._is_bf16 = dtypes == {torch.bfloat16}
        self._data_group = groups.data
        base = torch.optim.AdamW(
            [
                _parameter_group(named, decayed, config.weight_decay),
                _parameter_group(named, {name for name, _ in named} - decayed, 0.0),
            ],
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            eps=config.epsilon,
            fused=True,
        )
        self._optimizer = _initialize_deepspeed(
            model, base, groups=groups, clip_norm=config.clip_norm, is_bf16=self._is_bf16
        )

    @property
    def gradient_scale(self) -> float:
        """Factor to apply to a loss so that the reduced gradient is the *sum* over data ranks."""
        return 1.0 if self._is_bf16 else float(self._data_group.size())

    def gradient(self, parameter: nn.Parameter) -> Tensor:
        """The accumulated gradient of a local parameter, before `reduce_gradients`."""
        gradient = parameter._hp_grad if self._is_bf16 else parameter.grad  # type: ignore[attr-defined]
        assert isinstance(gradient, Tensor), "no backward pass has reached this parameter"
        return gradient

    def reduce_gradients(self) -> None:
        """Sums the accumulated gradients over the data ranks."""
        if self._is_bf16:
            flat_gradients, _ = self._optimizer.get_grads_for_reduction()
            for gradient in flat_gradients:
                all_reduce_sum(gradient, self._data_group)
        else:
            self._optimizer.reduce_gradients(pipeline_parallel=True)

    def step(self, learning_rate: float) -> StepReport:
        """Clips, updates the own part of the state, gathers the parameters, clears gradients."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        norm = float(self._optimizer._global_grad_norm)
        self._optimizer.zero_grad()
        return StepReport(
            learning_rate=learning_rate,
            gradient_norm=norm,
            skipped=bool(self._optimizer.overflow) or not math.isfinite(norm),
        )


def _parameter_group(
    named: Iterable[tuple[str, nn.Parameter]], names: set[str], weight_decay: float
) -> dict[str, Any]:
    """One AdamW parameter group; each pipeline stage has both, or DeepSpeed's norm would hang."""
    return {
        "params": [parameter for name, parameter in named if name in names],
        "weight_decay": weight_decay,
    }


def _initialize_deepspeed(
    model: nn.Module,
    base: torch.optim.Optimizer,
    *,
    groups: ProcessGroups,
    clip_norm: float,
    is_bf16: bool,
) -> Any:
    """The ZeRO-1 optimizer that `deepspeed.initialize` builds around `base`."""
    deepspeed: Any = importlib.import_module("deepspeed")
    deepspeed.utils.logger.setLevel(logging.ERROR)
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), verbose=False)
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "train_batch_size": groups.layout.data,
        "gradient_clipping": clip_norm,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": 1,
            "overlap_comm": False,
            "contiguous_gradients": True,
            "reduce_scatter": True,
            "reduce_bucket_size": min(_BUCKET_ELEMENTS, _num_elements(model)),
            "allgather_bucket_size": _BUCKET_ELEMENTS,
        },
        # Without it DeepSpeed would cast fp32 gradients to bf16 for the reduction.
        "communication_data_type": "fp32",
    }
    if is_bf16:
        # immediate_grad_update adds each bf16 gradient to the fp32 one as soon as it exists.
        settings["bf16"] = {"enabled": True, "immediate_grad_update": True}
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    with contextlib.redirect_stdout(io.StringIO()):  # it prints memory statistics unasked
        _, optimizer, _, _ = deepspeed.initialize(
            model=model,
            optimizer=base,
            mpu=groups.deepspeed_mpu,
            config=settings,
            dist_init_required=False,
        )
    return optimizer


def _num_elements(model: nn.Module) -> int:
    """Elements of this rank's parameters."""
    return sum(parameter.numel() for parameter in model.parameters())
