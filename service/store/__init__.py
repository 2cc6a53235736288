"""Where sessions are kept: one protocol, and an implementation a file."""
