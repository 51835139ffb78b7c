"""The float model: one call of it, copies, dry runs, the trace and its proof, addresses and
sites."""
