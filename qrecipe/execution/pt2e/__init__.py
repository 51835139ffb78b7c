"""The executor for programs of torch.export, which torchao's PT2E quantizes.

May import `execution` except for other executors, and below.
"""
