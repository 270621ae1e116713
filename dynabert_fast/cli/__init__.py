"""The `dynabert-fast` command line."""
