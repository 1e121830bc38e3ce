"""What any room may use; it knows no image and no network."""
