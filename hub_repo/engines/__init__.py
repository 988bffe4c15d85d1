"""Engines and client libraries beside torch, each in its own environment: `python -m hub_repo.engines`."""
