"""Annotation formats: one file each, found by its name. What a file has to hold is in `vlm.data.formats.contract`.

Parquet of one's own is no format yet: it is refused by its first bytes (`vlm.data.strictjson`). That of benchmarks is
read by `vlm.data.benchmarks._parquet`.
"""
