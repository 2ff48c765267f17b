"""Training: from scratch (`pretrain`) and on conversations (`train`)."""
