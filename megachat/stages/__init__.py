"""The three training stages as loops over shared parts, and the run that strings them together."""
