"""Converted models as files: plain tensors and all that is needed to rebuild the model."""
