"""Terminal output: tables and progress. May import nothing of qrecipe."""
