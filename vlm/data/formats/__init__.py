"""Annotation formats: one file each, found by its name. What a file has to hold is in `vlm.data.formats.contract`."""
