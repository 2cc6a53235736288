"""Serves recurrent models over HTTP and keeps one memory per session."""
