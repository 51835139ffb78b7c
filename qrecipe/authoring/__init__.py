"""What writes, holds and compares recipes and their plans."""
