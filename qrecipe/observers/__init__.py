"""Observers and fake-quants: registration, the contract of a class, plugins, making a `QConfig`.

May import `_torch_ao`, `_torch_fx` and below.
"""
