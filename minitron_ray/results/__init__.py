"""What a run leaves behind: Arrow tables, a manifest and folders; and how to read them."""
