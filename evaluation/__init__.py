"""What the models are worth: each `python -m evaluation.<name>` writes its figures with the command beside them."""
