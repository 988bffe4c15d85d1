"""What is published: folders that are Hub repositories, and the verb that writes them, `python -m hub_repo.export`."""
