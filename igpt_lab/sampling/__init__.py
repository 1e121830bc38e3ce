"""Weights -> images."""
