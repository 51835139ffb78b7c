"""The commands as declared to Typer; the work of each is in the module of its name."""
