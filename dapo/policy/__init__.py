"""π_θ: Megatron-core, the same code on a laptop's CPU and on many GPUs. The only room that imports
Megatron.
"""

import logging
import warnings

from dapo.policy import cpu

cpu.install()
# Megatron tells of optional packages at every import, and of its own deprecations at every call
for category in (UserWarning, FutureWarning, DeprecationWarning):
    warnings.filterwarnings(
        "ignore", category=category, module=r"megatron\.core|torch\.distributed|dapo\.policy\.cpu"
    )
logging.getLogger("megatron.core").setLevel(logging.WARNING)
# what fails there is raised too
logging.getLogger("megatron.core.dist_checkpointing").setLevel(logging.CRITICAL)
