"""Programs for people who work on megachat: pages that are generated, rehearsals, benchmarks."""
