"""Images -> tokens."""
