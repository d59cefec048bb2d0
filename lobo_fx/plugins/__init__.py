"""What other packages may add, and how it is found."""
