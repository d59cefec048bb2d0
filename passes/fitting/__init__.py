"""Layers as linear problems on calibration data."""
