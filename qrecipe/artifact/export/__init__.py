"""Quantized models for runtimes other than torch's kernels: a row of `targets` for each."""
