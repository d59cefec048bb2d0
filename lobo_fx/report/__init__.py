"""The report: its records, and the forms in which it is shown and saved."""
