"""KV-cache policies, one per file."""
