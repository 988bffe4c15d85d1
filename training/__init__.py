"""The three training stages of JinaBERT; each is `python -m training.<verb> --config RECIPE [key=value ...]`."""
