"""Measures asgi-cluster, and beside it what else there is: ``python -m loadtest --help``."""
