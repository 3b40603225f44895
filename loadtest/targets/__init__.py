"""The servers under test: each module makes a ``Subject`` from a Redis URL and a prefix."""
