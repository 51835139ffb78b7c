"""Executing a plan: calibration, the QAT schedule, provenance, and the executors."""
