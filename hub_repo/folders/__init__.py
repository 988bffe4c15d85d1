"""Model folders on this disk: what their files hold, what is wrong with them, and how they are written whole."""
