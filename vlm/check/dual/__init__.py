"""The checks of an image tower with its text tower, one file for each thing that is looked at; every file is found by
itself.

A file declares `CHECKS`, one `vlm.check.subject.Check` or several, as those of `vlm.check.checks` do; its functions
take a `vlm.check.dual_subject.DualSubject`.
"""
