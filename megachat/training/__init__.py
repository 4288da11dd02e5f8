"""Training and scoring of one role's model under its own parallel layout."""
