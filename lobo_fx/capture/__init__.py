"""From a model to a normalised `Program`, and back to an exported one."""
