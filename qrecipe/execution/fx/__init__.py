"""The executor for FX graph mode."""
