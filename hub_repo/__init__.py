"""What is published: folders that are Hub repositories, and the commands that write, check and push them.

Law: imports point one way. `folders` needs no other package here; `hub` and `formats` build on it, `embedding` on
`hub`, `corpus` on `embedding`. Commands (the modules beside them, `engines`, `cli`) import these, never the reverse.
"""
