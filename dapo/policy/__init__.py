"""π_θ on Megatron-core: the same code on a laptop's CPU and on many GPUs. Only policy/ imports Megatron."""

import logging
import warnings

from dapo.policy import cpu

cpu.install()
# Megatron warns about optional packages at every import, and about its own deprecations at every call
NOISY = r"megatron\.core|torch\.distributed|dapo\.policy\.cpu"
for category in (UserWarning, FutureWarning, DeprecationWarning):
    warnings.filterwarnings("ignore", category=category, module=NOISY)
logging.getLogger("megatron.core").setLevel(logging.WARNING)
# GPTModel is to become HybridModel one day; DDP chooses the layout that we would
for module in ("models.gpt.gpt_model", "distributed.distributed_data_parallel"):
    logging.getLogger(f"megatron.core.{module}").setLevel(logging.ERROR)
# errors that it logs are raised too
logging.getLogger("megatron.core.dist_checkpointing").setLevel(logging.CRITICAL)
