"""The Hub: what is read from a repository, what may be published, and one commit."""
