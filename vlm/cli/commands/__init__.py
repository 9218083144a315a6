"""The commands, one file each: `COMMAND` (`vlm.cli.options.Command`) says what it is called, which options it has and
what it runs. The file has the command's name: `eval_diff.py` is `vlm eval diff`, `import_.py` is `vlm import`.
"""
