"""Stands in for Transformer Engine where its torch part cannot be compiled: the modules of a GPT, with a real
version's keywords and names of parameters (../../signatures.json), computed in plain torch.
"""

from importlib import metadata

from transformer_engine import common, pytorch

__version__ = metadata.version("transformer-engine")
__all__ = ["common", "pytorch"]
