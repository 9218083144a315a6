"""Shared by all tests: one thread, no network, no terminal."""

import os

# Before torch is imported: tests are small, and threads that wait for each other cost more than they bring.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A test that reaches for a hub fails at once instead of retrying.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
