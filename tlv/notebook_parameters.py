"""The parameters cell of a notebook: what it holds, and whether given values fit."""

import ast
import re

COUNT = re.compile(r"^num_|_steps$|_size$|_layers$|^width$|^seed$")  # parameters never below 0
SIZE = re.compile(r"^num_(threads|processes|frames|queries|groups|keyframes|trials|samples)$|"
                  r"^(num_)?resampler_|^max_(new_tokens|seq_len|frames)$|^timeout_s$|^fps$|"
                  r"batch_size$|accum_steps$")  # and those that are not 0 either


class NotebookError(ValueError):
    """A notebook or its parameters are not as they must be; says what would be right."""


def parameters(notebook, where="notebook") -> dict[str, tuple]:
    """name -> (default, allowed types), from the one cell tagged `parameters`."""
    cells = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    if len(cells) != 1:
        raise NotebookError(f"{where}: {len(cells)} cells are tagged `parameters`, must be one")
    return read_parameters(cells[0].source, where)


def defaults_of(notebook) -> dict:
    """name -> default: the smoke run's parameters."""
    return {name: default for name, (default, _) in parameters(notebook).items()}


def read_parameters(source: str, where: str) -> dict[str, tuple]:
    """The same from the source of that cell: literals only."""
    found = {}
    for line in ast.parse(source).body:
        try:
            default = ast.literal_eval(line.value)
            name = (line.target if isinstance(line, ast.AnnAssign) else line.targets[0]).id
        except (ValueError, AttributeError):
            text = ast.unparse(line)
            raise NotebookError(
                f"{where}: the parameters cell holds `{text}`; only `name = literal`"
            ) from None
        annotation = ast.unparse(line.annotation) if isinstance(line, ast.AnnAssign) else ""
        found[name] = default, _types(default, annotation)
    return found


def _types(default, annotation: str) -> tuple:
    """The types a value may have: those of the annotation, else that of the default."""
    known = {"int": int, "float": float, "str": str, "bool": bool, "None": type(None),
             "list": list, "tuple": list, "dict": dict}  # fmt: skip
    words = [part.split("[")[0].strip() for part in annotation.split("|")] if annotation else []
    types = tuple(known[word] for word in words if word in known) or (type(default),)
    types = tuple(list if t is tuple else t for t in types)
    return types + ((int,) if float in types else ())


def check_parameters(values: dict, notebook, source: str, where: str) -> None:
    """Refuse unknown names and wrong types, naming the file `source`, the key and what is right."""
    known = parameters(notebook, where)
    for name, value in values.items():
        if name not in known:
            raise NotebookError(
                f"{source}: unknown parameter `{name}`; {where} has {', '.join(known)}"
            )
        default, types = known[name]
        if type(value) not in types:
            wanted = " or ".join(t.__name__ for t in types)
            raise NotebookError(
                f"{source}: `{name}: {value!r}` is {type(value).__name__}, must be {wanted} "
                f"(the default is {default!r})"
            )
        if wanted := _misfit(name, value, default):
            raise NotebookError(f"{source}: `{name}: {value!r}` must {wanted}")


def _misfit(name: str, value, default) -> str:
    """What a value of the right type must do and does not, "" if nothing."""
    if type(value) in (int, float):
        if SIZE.search(name) and value <= 0:
            return "be more than 0"
        return "be at least 0" if COUNT.search(name) and value < 0 else ""
    if type(value) is list and default:
        types = {type(one) for one in default} | ({int} if float in map(type, default) else set())
        if not value or {type(one) for one in value} - types:
            return f"be a list as {default!r} is"
    return ""
