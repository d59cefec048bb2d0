"""Weights as codes: which can be stored so, how they are rounded, and the surgery."""
