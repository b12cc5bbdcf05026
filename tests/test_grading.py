"""Graders: what is right, what is wrong, and what only looks right."""

from __future__ import annotations

import json
import threading
import time

import pytest

from esr_train.grading import load_grader
from esr_train.grading.function_call import read_calls
from esr_train.grading.math import boxed


@pytest.mark.parametrize(
    ("response", "right"),
    [("12", 1), ("well\n 12 \n\n", 1), ("a  b\n12", 1), ("12\nor 13", 0), ("112", 0), ("", 0)],
)
def test_exact(response: str, right: int) -> None:
    assert load_grader("exact")(response, "12") == {"accuracy": right}


@pytest.mark.parametrize(
    ("response", "answer", "last", "first"),
    [
        (r"so \boxed{1/2}", "0.5", 1, 1),
        (r"\boxed{3}, no: \boxed{\frac{1}{2}}", "1/2", 1, 0),
        (r"\boxed{\frac{1}{2}}, no: \boxed{3}", "1/2", 0, 1),
        ("the answer is 72", "48/2 = 24 ... #### 72", 1, 1),
        (r"\boxed{1,000}", "1000", 1, 1),
        (r"\boxed{x = 5}", "5", 1, 1),
        (r"\boxed{6}", "5", 0, 0),
        ("", "5", 0, 0),
        (r"\boxed{5", "6", 0, 0),
    ],
)
def test_math(response: str, answer: str, last: int, first: int) -> None:
    scores = load_grader("math")(response, answer)
    assert (scores["accuracy"], scores["first_boxed_accuracy"]) == (last, first)
    assert scores["boxed"] == float(bool(boxed(response)))


def test_math_in_another_thread() -> None:
    """math-verify limits its time by a signal, which other threads do not get."""
    found: list[float] = []
    grade = load_grader("math")
    thread = threading.Thread(target=lambda: found.append(grade("7", "7")["accuracy"]))
    thread.start()
    thread.join()
    assert found == [1.0]


def test_boxed_braces_nest() -> None:
    assert boxed(r"\boxed{\frac{1}{2}} \boxed{3} \boxed{4") == [r"\frac{1}{2}", "3"]


WANTED = json.dumps([{"get": {"city": ["New York"], "days": [3], "unit": ["C", ""]}}])


@pytest.mark.parametrize(
    ("response", "right"),
    [
        ('[get(city="new york,", days=3)]', 1),
        ('get(city="New York", days=3.0, unit="c")', 1),
        ('{"name": "get", "arguments": {"city": "NEW-YORK", "days": 3}}', 1),
        (
            '<tool_call>\n{"name": "get", "arguments": {"city": "New York", "days": 3}}\n'
            "</tool_call>",
            1,
        ),
        ('```json\n[{"name": "get", "arguments": {"city": "New York", "days": 3}}]\n```', 1),
        ('[get(city="New York")]', 0),  # days is missing
        ('[get(city="New York", days=True)]', 0),
        ('[get(city="New York", days="3")]', 0),
        ('[get(city="New York", days=3, hours=1)]', 0),
        ('[put(city="New York", days=3)]', 0),
        ('[get(city="New York", days=3), get(city="New York", days=3)]', 0),
    ],
)
def test_function_calls(response: str, right: int) -> None:
    assert load_grader("function_call")(response, WANTED) == {"accuracy": right, "parsed": 1.0}


@pytest.mark.parametrize(
    "text", ["", "I cannot.", "get(1)", "get(city=city)", "[1, 2]", "{}", "(" * 9999]
)
def test_what_is_no_call(text: str) -> None:
    assert read_calls(text) is None
    assert load_grader("function_call")(text, WANTED) == {"accuracy": 0.0, "parsed": 0.0}


def test_calls_in_any_order_each_once() -> None:
    wanted = json.dumps([{"f": {"x": [1, 2]}}, {"f": {"x": [1]}}])
    grade = load_grader("function_call")
    assert grade("[f(x=1), f(x=2)]", wanted)["accuracy"] == 1
    assert grade("[f(x=2), f(x=2)]", wanted)["accuracy"] == 0


TESTS = "assert add(1, 2) == 3\nassert add(-1, 1) == 0"


@pytest.fixture(scope="module")
def python_grade():
    return load_grader("python", allow_code=True)


@pytest.mark.parametrize(
    ("response", "right"),
    [
        ("Here:\n```python\ndef add(a, b):\n    return a + b\n```\ndone", 1),
        ("def add(a, b):\n    return a + b", 1),
        ("```python\ndef add(a, b):\n    return a - b\n```", 0),
        ("import sys\nsys.exit(0)", 0),
        ("import os\nos._exit(0)", 0),
        ("add = lambda a, b: a + b\nx = bytearray(4 << 30)", 0),  # memory
        ("def add(a, b): return a + b\nopen('big', 'wb').write(b'0' * (4 << 20))", 0),  # disk
        (
            "def add(a, b): return a + b\nimport socket\nsocket.create_connection(('::1', 1))",
            0,
        ),
        ("not python", 0),
        ("\0", 0),
    ],
)
def test_python(python_grade, response: str, right: int) -> None:
    assert python_grade(response, TESTS) == {"accuracy": right}


def test_python_has_no_network(python_grade) -> None:
    """A listening socket of this process is out of reach."""
    import socket

    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        code = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 2)"
        assert python_grade(code, "") == {"accuracy": 0.0}
        socket.create_connection(("127.0.0.1", port), 2).close()  # from here it is


def test_python_stops_what_does_not_end(python_grade, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("esr_train.grading.python.SECONDS", 1)
    start = time.perf_counter()
    assert python_grade("while True: pass", "") == {"accuracy": 0.0}
    assert python_grade("import time\ntime.sleep(60)", "") == {"accuracy": 0.0}
    assert time.perf_counter() - start < 20
