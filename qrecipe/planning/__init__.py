"""From sites and rules to a `Plan`: what a backend and a kernel can do, advice, text.

May import `runtimes` and below.
"""
