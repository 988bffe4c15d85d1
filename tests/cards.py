"""A model card that the Hub takes."""

CARD = """---
language: en
license: apache-2.0
library_name: sentence-transformers
pipeline_tag: sentence-similarity
tags:
  - jina_bert
---

# Small

A random model.
"""
