"""Static quantization: where integers run, with which ranges, and how a float graph becomes an integer one."""
