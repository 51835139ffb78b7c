"""A float model compared with a quantized one."""
