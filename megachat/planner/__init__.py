"""Memory, bytes and predicted times of a job of any size, computed without running it. Pure."""
