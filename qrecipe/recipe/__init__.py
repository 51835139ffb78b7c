"""From TOML text to a `Recipe`: schema, layers, references, checks and lint."""
