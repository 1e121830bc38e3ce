"""Hidden states -> pooled features, kept on disk."""
