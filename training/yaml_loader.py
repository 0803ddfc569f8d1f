"""How the YAML of recipes and overrides is read."""

import re
from typing import Any

import yaml


class RecipeLoader(yaml.SafeLoader):
    """1e-3 is a number, and no, off, yes and on are strings: PyYAML follows YAML 1.1, which has it otherwise."""


_BOOL, _TRUE_OR_FALSE = "tag:yaml.org,2002:bool", re.compile("^(?:true|True|TRUE|false|False|FALSE)$")
RecipeLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOL]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
RecipeLoader.add_implicit_resolver(_BOOL, _TRUE_OR_FALSE, list("tTfF"))
RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?$"),
    list("-+0123456789."),
)


def read_yaml(text: str, name: str) -> Any:
    """The value of a YAML text. Raises ValueError, which begins with `name`, where it is none."""
    try:
        return yaml.load(text, Loader=RecipeLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{name} cannot be read as YAML: {' '.join(str(error).split())}") from error
