"""The warehouse: KV blocks in dram and on disk. Knows nothing of models, HTTP or routing."""
