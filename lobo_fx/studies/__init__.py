"""Searches over settings: recipes drawn from a space, compiled and measured in a study that processes share."""
