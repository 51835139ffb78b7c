"""A float model beside a quantized one."""
