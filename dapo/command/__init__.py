"""The command line: its words, the ranks that it launches, and the one line that says how they ended."""
