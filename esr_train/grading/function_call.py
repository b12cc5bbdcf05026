"""Grader "function_call": calls compared by meaning, with the answers of BFCL's simple sets.

The answer is JSON: a list of {function name: {parameter: [values allowed]}}. A parameter whose
allowed values include "" may be left out. The response is Python, `[f(a=1), g(b="x")]`, or JSON,
a {"name": ..., "arguments": {...}} or a list of them, with or without a code fence or <tool_call>
tags around each. Calls may come in any order. Strings are compared without case, white space and
the punctuation ,./-_*^ ; 1 equals 1.0, and True is no number.
"""

from __future__ import annotations

import ast
import json
import re
from typing import Any

_FENCE = re.compile(r"```(?:json|python)?\s*(.*?)```", re.DOTALL)
_TOOL_CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)
_IGNORED = re.compile(r"[\s,./\-_*^]")

Call = tuple[str, dict[str, Any]]


def grade(response: str, answer: str) -> dict[str, float]:
    """Scores {"accuracy", "parsed"}; parsed is 1.0 where calls could be read at all."""
    wanted = json.loads(answer)
    wanted = wanted if isinstance(wanted, list) else [wanted]
    calls = read_calls(response)
    right = calls is not None and _all_match(wanted, calls)
    return {"accuracy": float(right), "parsed": float(calls is not None)}


def read_calls(text: str) -> list[Call] | None:
    """The calls in a response, or None if it is no call."""
    tagged = _TOOL_CALL.findall(text)
    if tagged:
        found = [_from_json(part) for part in tagged]
        return None if None in found else [call for calls in found for call in calls or []]
    fenced = _FENCE.search(text)
    text = (fenced.group(1) if fenced else text).strip()
    calls = _from_json(text)
    return _from_python(text) if calls is None else calls


def _from_json(text: str) -> list[Call] | None:
    try:
        data = json.loads(text)
    except ValueError:
        return None
    calls = []
    for item in data if isinstance(data, list) else [data]:
        if not isinstance(item, dict) or not isinstance(item.get("name"), str):
            return None
        arguments = item.get("arguments", item.get("parameters", {}))
        if not isinstance(arguments, dict):
            return None
        calls.append((item["name"], arguments))
    return calls or None


def _from_python(text: str) -> list[Call] | None:
    try:
        body = ast.parse(text, mode="eval").body
        nodes = body.elts if isinstance(body, (ast.List, ast.Tuple)) else [body]
        calls = []
        for node in nodes:
            if not isinstance(node, ast.Call) or node.args:
                return None
            arguments = {str(k.arg): ast.literal_eval(k.value) for k in node.keywords}
            calls.append((ast.unparse(node.func), arguments))
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        return None
    return calls or None


def _all_match(wanted: list[dict[str, Any]], calls: list[Call]) -> bool:
    """Whether each wanted call is matched by a call of its own, and none is left."""
    if len(wanted) != len(calls):
        return False
    if not wanted:
        return True
    first, rest = wanted[0], wanted[1:]
    return any(
        _matches(first, call) and _all_match(rest, calls[:at] + calls[at + 1 :])
        for at, call in enumerate(calls)
    )


def _matches(wanted: dict[str, Any], call: Call) -> bool:
    ((name, allowed),) = wanted.items()
    if call[0] != name or set(call[1]) - set(allowed):
        return False
    for parameter, values in allowed.items():
        if parameter not in call[1]:
            if "" not in values:
                return False
        elif not any(_same(call[1][parameter], value) for value in values):
            return False
    return True


def _same(given: Any, wanted: Any) -> bool:
    if isinstance(given, str) and isinstance(wanted, str):
        return _IGNORED.sub("", given).lower() == _IGNORED.sub("", wanted).lower()
    if isinstance(given, bool) or isinstance(wanted, bool):
        return given is wanted
    if isinstance(given, (int, float)) and isinstance(wanted, (int, float)):
        return given == wanted
    if isinstance(given, (list, tuple)) and isinstance(wanted, (list, tuple)):
        return len(given) == len(wanted) and all(map(_same, given, wanted))
    if isinstance(given, dict) and isinstance(wanted, dict):
        # Nested mappings list the allowed values of each key, as the outer one does.
        lists = {key: v if isinstance(v, list) else [v] for key, v in wanted.items()}
        return _matches({"": lists}, ("", given))
    return type(given) is type(wanted) and given == wanted
