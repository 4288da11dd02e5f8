"""Chooses how threads of OpenMP wait for work, which its library reads when it is loaded.

So this imports nothing, and the command calls it before anything imports torch.
"""

import os

_SPINS = "1000"
"""Looks at a flag before a thread that has nothing to do sleeps; libgomp's own choice is 300,000.
On a machine that does something else, too, those that spin keep those that compute from the cores
(docs/decisions/0021-ends-of-commands.md has figures)."""
_CHOICES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
"""What a user may have set instead."""


def let_idle_threads_sleep() -> None:
    """For this process and those below it; what the user has set stays."""
    if not any(name in os.environ for name in _CHOICES):
        os.environ["GOMP_SPINCOUNT"] = _SPINS
