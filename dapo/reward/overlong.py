"""The soft overlong punishment (Eq. 13)."""


def soft_overlong_penalty(length: int, max_length: int, cache: int) -> float:
    """Return what is added to the reward of Eq. 7: 0 up to max_length − cache, then down to −1 at max_length.

    It is linear between them, and −1 beyond. Lengths are in tokens. The paper has max_length 20,480 and cache
    4,096: `soft_overlong_penalty(18_432, 20_480, 4_096)` → −0.5.
    """
    return -min(max((length - (max_length - cache)) / cache, 0.0), 1.0)
