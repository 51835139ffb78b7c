"""Executing a plan: calibration, the QAT schedule, provenance, and the executors.

May import `audit` and below.
"""
