"""Merge, quantize and export a model; `export.parity` proves that each artifact equals the one it came from."""
