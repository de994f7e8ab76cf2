"""Who ends a process that nobody watches any more: signals, guardians of ranks and of servers."""
