"""Shows runs as one HTML page, read without torch."""
