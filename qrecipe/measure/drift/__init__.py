"""New data compared with the ranges of calibration."""
