"""A float model beside a quantized one. May import what `measure` may."""
