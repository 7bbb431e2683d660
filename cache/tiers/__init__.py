"""Places where extents live."""
