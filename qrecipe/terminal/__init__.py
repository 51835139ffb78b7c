"""What is shown on a terminal: tables and progress. May import nothing of qrecipe."""
