"""This room ends processes that nobody watches any more: signals; guardians of ranks, servers, workers."""
