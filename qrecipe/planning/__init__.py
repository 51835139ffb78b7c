"""From sites and rules to a `Plan`: what a backend and a kernel can do, advice, the plan as
text."""
