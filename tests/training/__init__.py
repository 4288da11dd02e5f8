"""DeepSpeed collects garbage nine times for each bf16 optimizer; loaded modules are none."""

import gc

gc.freeze()
