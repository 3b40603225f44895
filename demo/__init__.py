"""The demo: a board that several people edit at once, on several nodes. ``python -m demo``."""
