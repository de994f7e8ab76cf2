"""Soft overlong punishment (Eq. 13)."""


def soft_overlong_penalty(length: int, max_length: int, cache: int) -> float:
    """0 up to max_length − cache, then linear to −1 at max_length, and −1 beyond: added to the reward of Eq.
    7.

    Lengths in tokens. The paper: max_length 20,480, cache 4,096, so `soft_overlong_penalty(18_432, 20_480,
    4_096)` → −0.5.
    """
    return -min(max((length - (max_length - cache)) / cache, 0.0), 1.0)
