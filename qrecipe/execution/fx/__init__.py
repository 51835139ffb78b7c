"""The executor for FX graph mode. May import `execution` beside the other executors, and below."""
