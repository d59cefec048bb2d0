"""The report: its records, and the forms that they take."""
