"""Graphs that were made elsewhere: found out about, tried, and published as bundles. Needs onnx, not torch."""
