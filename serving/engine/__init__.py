"""The engine: continuous batching over a paged KV pool, in one process, without Ray."""
