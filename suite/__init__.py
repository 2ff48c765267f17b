"""suite: train, merge, quantize, export, serve and evaluate, each artifact measured against its parent."""

__version__ = "0.1.0"
