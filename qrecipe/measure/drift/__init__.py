"""New data against the ranges of calibration."""
