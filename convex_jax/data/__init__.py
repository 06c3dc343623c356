"""Examples to device batches."""
