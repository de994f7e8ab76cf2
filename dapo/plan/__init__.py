"""What a config means before anything is launched: memory, time, advice, and the run's numbers."""
