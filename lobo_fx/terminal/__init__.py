"""Output on the terminal: tables, progress, and silenced libraries."""
