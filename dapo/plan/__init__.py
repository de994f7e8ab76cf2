"""What a config comes to before anything is launched: memory, time, advice, and what the run's numbers will
mean.
"""
