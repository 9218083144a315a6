"""Official files of benchmarks: one file here per format, found by its name.

Each has `FORMAT`, what its files look like (`Benchmark` of `vlm.data.benchmarks.contract`), and `read(source)`, an
iterator over the items (`vlm.data.items.Item`) in the files of a `vlm.data.source.Source`. Tasks read all files of a
split; `vlm score` reads the one file with the gold texts, with nothing else on the disk.
"""
