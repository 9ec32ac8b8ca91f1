"""Who takes part, and what server and clients exchange."""
