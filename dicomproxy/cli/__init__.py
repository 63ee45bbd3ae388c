"""Commands. Exit codes: 0 done, 1 an operation failed, 2 usage or configuration."""
