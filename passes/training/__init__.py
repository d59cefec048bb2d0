"""Passes that train: one training loop, and the objectives that it lowers."""
