"""Measures asgi-cluster beside other libraries: ``python -m loadtest --help``."""
