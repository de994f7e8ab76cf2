"""Turns groups into updates: advantages (Eq. 9), token weights (Eq. 8), packing. Knows no process groups."""
