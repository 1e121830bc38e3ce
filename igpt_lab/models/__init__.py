"""Tokens -> logits: the network, its configuration, its files, its losses."""
