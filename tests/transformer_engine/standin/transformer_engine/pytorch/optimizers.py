from torch.optim import SGD as FusedSGD

from dapo.policy.cpu import AdamW as FusedAdam

__all__ = ["FusedAdam", "FusedSGD"]
