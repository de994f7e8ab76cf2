"""How groups become updates: advantages (Eq. 9), what each token weighs (Eq. 8), minibatches and packing.

Nothing here imports process groups.
"""
