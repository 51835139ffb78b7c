"""How results are shown: reports as text and HTML, tables, progress. May import `errors`."""
