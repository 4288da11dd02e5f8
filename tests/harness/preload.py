"""Imported once by the fork server, so that every rank starts with the heavy modules loaded."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import warnings

warnings.filterwarnings("ignore")

import deepspeed  # noqa: E402, F401
import megatron.core.models.common.language_module.language_module  # noqa: E402, F401
import megatron.core.pipeline_parallel.schedules  # noqa: E402, F401
import megatron.core.transformer.transformer_block  # noqa: E402, F401
import torch  # noqa: E402
import torch.distributed  # noqa: E402, F401
from transformers.models.opt import modeling_opt  # noqa: E402, F401

torch.set_num_threads(1)
