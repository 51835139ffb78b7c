"""A converted model as a file, and back. May import `pipeline` and below."""
