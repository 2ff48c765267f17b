"""The torch engine: token ids in, tokens out, on any machine that runs torch."""
