"""Commands that need both: what was trained, and what it withstands. Training imports evaluation, never the reverse."""
