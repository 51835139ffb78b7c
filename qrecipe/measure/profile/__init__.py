"""The time of each site, as int8 and as float, and of each boundary between them."""
