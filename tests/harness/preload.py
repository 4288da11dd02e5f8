"""Imported once by the fork server, so that every rank starts with the heavy modules loaded."""

import gc
import importlib
import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # ranks are CPU ranks, on machines with a GPU too
os.environ["DS_ACCELERATOR"] = "cpu"

import warnings

warnings.filterwarnings("ignore")

import deepspeed  # noqa: E402, F401
import torch  # noqa: E402
from transformers.models.opt import modeling_opt  # noqa: E402, F401

import megachat.stages.run  # noqa: E402, F401

torch.set_num_threads(1)

# What a rank would otherwise import for its test, its first model and its first optimizer.
for _module in (
    "pytest",
    "deepspeed.comm.mori",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "megatron.core.models.backends",
    "megatron.core.transformer.moe.experts",
    "megatron.core.transformer.multi_token_prediction",
    "torch.profiler",
):
    importlib.import_module(_module)

# Ranks share the memory of what stands so far: a collection that visits it would copy it, which
# takes half a second a rank.
gc.collect()
gc.freeze()
