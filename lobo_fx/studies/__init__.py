"""Searches over settings: recipes drawn from a space are compiled and measured, in a study that processes share."""
