"""What a run stands on, without torch: paths, files, provenance, ranks, lock, values, seeds."""
