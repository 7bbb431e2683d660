"""Where a request goes: mirror of the node stores, cost model, policy. Knows nothing of engines."""
