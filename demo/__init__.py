"""The demo: a board that several people edit at once, on several nodes behind one port. ``python -m demo``."""
