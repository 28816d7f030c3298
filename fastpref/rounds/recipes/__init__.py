"""The recipes: each a file of choices over the primitives of :mod:`fastpref.rounds`."""
