"""From prompts to groups: Algorithm 1, lines 2 to 9. No process groups."""

from dapo.learn.advantages import group_advantages

__all__ = ["group_advantages"]
