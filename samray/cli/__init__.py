"""The command line: parse, call, print; errors become one sentence and an exit code."""
