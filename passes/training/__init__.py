"""Passes that train: one loop, and what it is asked to lower."""
