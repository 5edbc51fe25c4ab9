"""The decoder: attention, MLP, blocks, embedding and head."""
