"""As much of the router as starting and stopping it needs."""
