"""The modules of the published code under their names, for scripts that import them. The library is `mae`."""
