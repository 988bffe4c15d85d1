"""What the models are worth: each evaluation is `python -m evaluation.<name>` and writes its figures with the command beside them."""
