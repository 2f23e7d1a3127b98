"""Measuring: the cases of every op, read by `fastllm bench`, by `pytest benchmarks` and by the tests."""
