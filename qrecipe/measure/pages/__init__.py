"""Reports as HTML pages and plots. May import what `measure` may."""
