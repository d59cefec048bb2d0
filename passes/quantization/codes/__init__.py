"""Weights as codes: which weights can be stored so, how they are rounded, and the surgery on the graph."""
