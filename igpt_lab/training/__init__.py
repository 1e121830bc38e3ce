"""Images -> weights."""
