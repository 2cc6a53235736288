"""The HTTP side: routes, request and answer formats, errors."""
