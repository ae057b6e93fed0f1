"""What may be kept of the teacher for the students to learn from; one file each, named by its `kind`."""
