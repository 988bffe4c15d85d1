"""Texts in, vectors out: input files, the model, output in parts that can be resumed, an index; no verb of its own."""
