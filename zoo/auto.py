"""`import zoo.auto` registers the zoo's config and models with transformers' Auto classes.

The functions of `zoo` do this by themselves; plain transformers code needs this one import to load a zoo checkpoint.
"""

from zoo.architectures.core.modeling import register

register()
