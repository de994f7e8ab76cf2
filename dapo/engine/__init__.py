"""Samplers of π_θold, behind the Engine protocol of types.py. Never imports the policy."""
