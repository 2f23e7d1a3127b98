"""Doors to other libraries: a module of the same name for each, imported only when asked for."""
