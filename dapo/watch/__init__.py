"""This room ends processes that nobody watches any more: signals, and guardians of ranks and servers."""
