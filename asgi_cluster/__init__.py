"""One ASGI middleware: sessions, logouts and live rooms that stay one across every node."""

__version__ = "0.1.0"
