"""A converted model as a file, and back. May import `measure`, `pipeline` and below."""
