"""The executor that swaps modules, for models that cannot be traced."""
