"""How ranks are arranged, grouped, connected and started."""

import warnings

# megatron-core says this a dozen times at import; `model/layers.py` reports the accelerators once.
warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")

MEGATRON_HINT = (
    "a transformer-engine without its torch part is installed; build transformer-engine[pytorch] "
    "from source or uninstall it"
)
"""What to do when megatron-core cannot be imported."""
