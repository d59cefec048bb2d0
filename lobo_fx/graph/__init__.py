"""Graphs: operators and layers, shapes, the `Program`, masks, and how it is rewritten and run."""
