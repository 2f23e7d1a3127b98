"""Training: one step loop, and what stands on it."""
