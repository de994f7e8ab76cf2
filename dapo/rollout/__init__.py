"""Turns prompts into groups (Algorithm 1, lines 2 to 9). Knows no process groups."""

from dapo.learn.advantages import group_advantages

__all__ = ["group_advantages"]
