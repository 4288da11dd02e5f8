"""How ranks are arranged, grouped, connected and started."""

import warnings
from datetime import timedelta

# megatron-core says this a dozen times at import; `model/layers.py` reports the accelerators once.
warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")

MEGATRON_HINT = (
    "a transformer-engine without its torch part is installed; build transformer-engine[pytorch] "
    "from source or uninstall it"
)
"""What to do when megatron-core cannot be imported."""

GROUP_TIMEOUT = timedelta(minutes=30)
"""How long a collective may wait for its slowest rank (a generation phase can be long)."""

HANDOVER_LIMIT = timedelta(hours=12)
"""How long ranks wait, outside any collective, for one that reads, writes or prepares something."""
