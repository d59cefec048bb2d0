"""What a person at a terminal sees: tables, progress, and silence from libraries."""
