"""What a pass is, what it may use, and what is checked after it."""
