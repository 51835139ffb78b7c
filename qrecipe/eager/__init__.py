"""torch's eager mode as an executor: dynamic and weight-only modules of a model, untraced."""
