"""New data against the ranges of calibration. May import what `measure` may."""
