"""From groups to updates: advantages (Eq. 9), what each token weighs (Eq. 8), minibatches and packing. No
process groups.
"""
