"""The lines of a YAML file's keys, so that a mistake is told with its place."""

from __future__ import annotations

from pathlib import Path


def key_lines(file: str) -> dict[str, int]:
    """Key → its line, counted from 1; a key of a mapping below is `above.key`, an entry of a list below `above.0`, and
    dashes are underscores.

    Empty for a file that is no YAML mapping: whoever reads its values has told so.
    """
    import yaml

    try:
        root = yaml.compose(Path(file).read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    found: dict[str, int] = {}

    def walk(node, above: str) -> None:
        for key, value in node.value if isinstance(node, yaml.MappingNode) else []:
            name = above + str(key.value).replace("-", "_")
            found[name] = key.start_mark.line + 1
            walk(value, f"{name}.")
        for i, value in enumerate(node.value if isinstance(node, yaml.SequenceNode) else []):
            found[f"{above}{i}"] = value.start_mark.line + 1
            walk(value, f"{above}{i}.")

    walk(root, "")
    return found
