"""What people see of a run: the live view while it goes, the ranking from its tables."""
