"""The kinds of plug-ins that other packages may add, and how they are found."""
