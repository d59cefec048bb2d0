"""Layers replaced by two layers of a lower rank."""
