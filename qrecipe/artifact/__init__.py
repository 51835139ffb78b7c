"""Converted models as files: plain tensors, and all that is needed to build the model again."""
