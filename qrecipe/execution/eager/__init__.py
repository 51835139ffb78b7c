"""The eager-mode executor: swaps modules of models that cannot be traced."""
