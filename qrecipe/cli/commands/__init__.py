"""The commands as declared to Typer; the modules of the same name do the work."""
