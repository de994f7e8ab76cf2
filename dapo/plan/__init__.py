"""Plans a run before anything is launched: memory, time, advice, and what its numbers will mean."""
