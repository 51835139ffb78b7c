"""A plugin of qrecipe: an observer, a fake-quant and a recipe that uses both.

The modules are imported one by one, when a recipe names what they register.
"""
