"""What a run tells about itself: log lines, metrics, phase times, FLOP counts, progress, report."""
