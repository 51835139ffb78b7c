"""Layers that hold layers, opened: written with the linear layers that rules and kernels know.

A traced graph shows torch's attention and transformer layers as single operations, without a
kernel. Opened, in a copy of the model that shares its tensors, they compute the same and show
what they hold.
"""
