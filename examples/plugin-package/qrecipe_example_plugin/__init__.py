"""A plugin of qrecipe: an observer, a fake-quant and a recipe that uses both.

Each module is imported only when a recipe names what it registers.
"""
