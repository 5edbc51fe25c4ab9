"""Sources, tokenizing, MDS shards and streaming loaders."""
