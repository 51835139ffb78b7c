"""FX graph mode as one executor of a plan: emission, preparation, conversion, audit."""
