"""DAPO (arXiv:2503.14476) on Megatron-core. Start reading at train.py, the paper's Algorithm 1."""
