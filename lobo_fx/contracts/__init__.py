"""The contract of a pass: what it is, what it may use, and what is checked after it."""
