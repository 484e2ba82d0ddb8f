"""Paddle's form of a mask: `startend_row_indices`."""
