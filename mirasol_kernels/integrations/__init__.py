"""One file per host library; each is imported by name and asks for nothing but torch and its host."""
