"""How ranks are arranged, grouped, connected and started."""

import warnings

# megatron-core says this a dozen times at import; `model/layers.py` reports the accelerators once.
warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
