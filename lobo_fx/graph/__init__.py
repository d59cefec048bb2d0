"""Graphs: operators and layers, shapes, the `Program`, masks, and how a graph is rewritten and run."""
