"""Cached features of a frozen tower: what is on the disk and how a batch reads it (`store`), and its making (`encode`).

With `cache_features` a stage runs its frozen tower once over its images, before the first step.
"""
