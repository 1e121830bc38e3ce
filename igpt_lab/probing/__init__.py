"""Pooled features -> probe rows."""
