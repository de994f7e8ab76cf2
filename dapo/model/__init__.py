"""Reads a Hugging Face directory: sizes, files, tokenizer; checks layouts. Knows no process groups."""
