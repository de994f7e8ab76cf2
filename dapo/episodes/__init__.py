"""Rollouts of several turns: the policy acts, an environment answers, and the policy goes on."""

from dapo.episodes.environment import Environment, Message, Reply, ToolCall, Turn

__all__ = ["Environment", "Message", "Reply", "ToolCall", "Turn"]
