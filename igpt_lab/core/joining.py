"""Our classes as those of transformers, where a user has imported it: for code that asks what a class is.

peft adapts linear maps by their class, and a `Trainer` saves the configuration of models of its own class alone.
transformers is never imported here. What a class of ours has stays; what only transformers' has comes behind it.
"""

import sys


def join(cls: type, module: str, name: str) -> None:
    """Put transformers' class `name` of `module` behind `cls`, once that module was imported by somebody else."""
    peer = getattr(sys.modules.get(f"transformers.{module}"), name, None)
    if peer is not None and not issubclass(cls, peer):
        cls.__bases__ = (peer,)
