"""The files of other engines, each checked in its engine against torch."""
