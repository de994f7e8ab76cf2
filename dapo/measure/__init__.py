"""Measures what a step takes: seconds of all ranks, throughput, traces."""
