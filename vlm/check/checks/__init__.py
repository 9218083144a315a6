"""The checks, one file for each thing that is looked at; every file is found by itself.

A file declares `CHECKS`, one `vlm.check.subject.Check` or several: a name, what should hold, the function from the
`Subject` to a `Finding`, and its place in the table.
"""
