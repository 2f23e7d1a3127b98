"""Decoding: cache, capture and replay of a step, the engine."""
