"""From a configuration to a run and what is made of it; the only room that knows the configuration."""
