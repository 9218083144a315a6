"""The commands, one file each: `COMMAND` says what it is called, which options it has and what it runs."""
