"""Observers and fake-quants: registration, the contract of a class, loading plugins, making a
`QConfig`."""
