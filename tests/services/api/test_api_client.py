"""A client that is generated from the OpenAPI document alone works: it reads, registers, promotes and starts.

The generator is a small one of this test's own, of the usual kind: a pydantic model for every schema and a typed
function for every operation, as Python source. It knows nothing of Moestro; what it cannot make from the document is
a hole in the document.
"""

import ast
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

HEADER = '''"""Generated."""
from __future__ import annotations
from typing import Any, Literal, Optional, Union
from urllib.parse import quote
import httpx
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter


class ApiError(Exception):
    def __init__(self, status: int, body: Any) -> None:
        super().__init__(f"{status}: {body}")
        self.status = status
        self.body = body

'''
CLIENT = """
class Client:
    def __init__(self, http: httpx.Client) -> None:
        self._http = http

    def _call(self, kind: Any, method: str, path: str, query: dict[str, Any], body: Any) -> Any:
        sent = None if body is None else body.model_dump(mode="json", exclude_unset=True, by_alias=True)
        asked = {name: value for name, value in query.items() if value is not None}
        answer = self._http.request(method, path, params=asked, json=sent)
        if answer.status_code >= 400:
            refusal: Any = REFUSALS[method, path_of(method, path), str(answer.status_code)]
            raise ApiError(answer.status_code, TypeAdapter(refusal).validate_python(answer.json()))
        return None if kind is None else TypeAdapter(kind).validate_python(answer.json())

"""
PRIMITIVES = {
    "string": "str",
    "integer": "int",
    "number": "float",
    "boolean": "bool",
    "null": "None",
    "object": "dict[str, Any]",
}


def annotation(schema: dict[str, Any]) -> str:
    """The Python type of a schema; raises `KeyError` for one that says nothing."""
    if "$ref" in schema:
        return str(schema["$ref"].rpartition("/")[2])
    if values := [schema["const"]] if "const" in schema else schema.get("enum"):
        return f"Literal[{', '.join(map(repr, values))}]"
    if choices := schema.get("anyOf") or schema.get("oneOf"):
        return f"Union[{', '.join(annotation(choice) for choice in choices)}]"
    if schema.get("type") == "array":
        return f"list[{annotation(schema['items'])}]"
    if isinstance(schema.get("additionalProperties"), dict) and schema["additionalProperties"]:
        return f"dict[str, {annotation(schema['additionalProperties'])}]"
    return PRIMITIVES[schema["type"]] if "type" in schema else "Any"


def model(name: str, schema: dict[str, Any]) -> str:
    """The source of one schema's class, or alias."""
    if "properties" not in schema:
        return f"{name} = {annotation(schema)}\n" if "type" in schema and "oneOf" not in schema else ""
    extra = "allow" if schema.get("additionalProperties", True) else "forbid"
    lines = [f"class {name}(BaseModel):", f"    model_config = ConfigDict(extra={extra!r}, protected_namespaces=())"]
    required = set(schema.get("required", ()))
    for field, inner in schema["properties"].items():
        kind = annotation(inner)
        lines.append(f"    {field}: {kind}" if field in required else f"    {field}: Optional[{kind}] = None")
    return "\n".join(lines) + "\n"


def operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield path, method.upper(), operation


def answer_kind(operation: dict[str, Any]) -> str:
    """What a call returns: the schema of the first status that is a success."""
    success = next(code for code in operation["responses"] if code.startswith("2"))
    content = operation["responses"][success].get("content", {})
    return annotation(content["application/json"]["schema"]) if "application/json" in content else "None"


def function(path: str, method: str, operation: dict[str, Any]) -> str:
    """The source of one operation's method."""
    arguments, query, place = ["self"], [], path
    for parameter in operation.get("parameters", ()):
        name, kind = parameter["name"], annotation(parameter["schema"])
        if parameter["in"] == "path":
            arguments.append(f"{name}: {kind}")
            place = place.replace(f"{{{name}}}", f"{{quote({name}, safe='')}}")
        elif parameter["in"] == "query":
            query.append(name)
    body = operation.get("requestBody", {}).get("content", {}).get("application/json")
    if body:
        kind = annotation(body["schema"])
        arguments.append(
            f"body: {kind}" if operation["requestBody"].get("required") else f"body: Optional[{kind}] = None"
        )
    by_name = {parameter["name"]: parameter for parameter in operation.get("parameters", ())}
    arguments += [f"{name}: Optional[{annotation(by_name[name]['schema'])}] = None" for name in query]
    kind = answer_kind(operation)
    asked = "{" + ", ".join(f"{name!r}: {name}" for name in query) + "}"
    call = f"self._call({kind}, {method!r}, f{place!r}, {asked}, {'body' if body else 'None'})"
    returned = f"        result: {kind} = {call}\n        return result\n" if kind != "None" else f"        {call}\n"
    return f"    def {operation['operationId']}({', '.join(arguments)}) -> {kind}:\n{returned}"


def refusals(document: dict[str, Any]) -> str:
    """A table of what each status of each operation holds, and which operation a path belongs to."""
    rows = [
        f"    ({method!r}, {path!r}, {status!r}): {annotation(response['content']['application/json']['schema'])},"
        for path, method, operation in operations(document)
        for status, response in operation["responses"].items()
        if status.isdecimal() and int(status) >= 400
    ]
    paths = [(method, path) for path, method, _ in operations(document)]
    return "\n".join(
        [
            "REFUSALS: dict[tuple[str, str, str], Any] = {",
            *rows,
            "}",
            f"PATHS = {paths!r}",
            "",
            "def path_of(method: str, path: str) -> str:",
            "    def fits(known: str) -> bool:",
            "        pairs = list(zip(known.split('/'), path.split('/')))",
            "        same = known.count('/') == path.count('/')",
            "        return same and all(a == b or a.startswith('{') for a, b in pairs)",
            "    return next(known for other, known in PATHS if other == method and fits(known))",
            "",
        ]
    )


def generated(document: dict[str, Any]) -> str:
    """The source of a whole client."""
    models = "\n".join(model(name, schema) for name, schema in document["components"]["schemas"].items())
    functions = "\n".join(function(*operation) for operation in operations(document))
    return HEADER + models + "\n" + refusals(document) + CLIENT + functions


@pytest.fixture
def source(api: Any) -> str:
    return generated(api.assembled.described())


@pytest.fixture
def client(source: str, admin: httpx.Client) -> Iterator[tuple[Any, Any]]:
    """The generated module and a client of it."""
    module = types.ModuleType("generated_client")
    sys.modules[module.__name__] = module
    exec(compile(source, "generated_client.py", "exec"), module.__dict__)
    yield module, module.__dict__["Client"](admin)
    del sys.modules[module.__name__]


def test_it_lists_reads_registers_and_promotes(
    client: tuple[Any, Any], deployment_fingerprint: str, deployed: Callable[..., str]
) -> None:
    module, moestro = client
    assert [run.name for run in moestro.list_runs(limit=5)] == ["small"]
    assert {step.stage for step in moestro.list_steps("latest")} >= {"mix", "deploy"}
    (deployment,) = moestro.list_deployments()
    assert deployment.fingerprint == deployment_fingerprint
    detail = moestro.read_artifact(deployment_fingerprint)
    assert (detail.record.stage, len(detail.lineage) > 5) == ("deploy", True)
    assert moestro.read_experts("mix").num_experts == 3
    for letter in "ab":
        moestro.register_version("assistant", module.RegisterRequest(deployment=deployed(letter)))
    canary = moestro.promote_version("assistant", module.PromoteRequest(share=0.1))
    assert (canary.version, canary.canary_share) == ("2", 0.1)
    done = moestro.promote_version("assistant", module.PromoteRequest(version="2"))
    assert done.aliases == {"champion": "2", "previous": "1"}
    assert moestro.roll_back("assistant").aliases["champion"] == "1"
    assert [one.version for one in moestro.read_model("assistant").versions] == ["2", "1"]
    assert [entry.action for entry in moestro.read_audit(limit=2)] == ["rollback", "promote"]


def test_it_asks_models_and_reads_what_they_do(api: Any, client: tuple[Any, Any], deployment_fingerprint: str) -> None:
    module, moestro = client
    moestro.register_version("assistant", module.RegisterRequest(deployment=deployment_fingerprint))
    api.wait_for({"1": "serving"})
    assert {card.id for card in moestro.list_served_models().data} >= {"assistant", "assistant@champion"}
    completion = moestro.create_completion(module.CompletionRequest(model="assistant", prompt="12 + 7 ="))
    assert (completion.choices[0].text, completion.usage.completion_tokens) == (" 19", 2)
    message = module.Message(role="user", content="What is 12 + 7?")
    chat = moestro.create_chat_completion(module.ChatRequest(model="assistant@champion", messages=[message]))
    assert chat.choices[0].message.content == " 19"
    assert moestro.read_readiness().ready
    with pytest.raises(module.ApiError) as unknown:
        moestro.create_completion(module.CompletionRequest(model="nothing", prompt=""))
    assert (unknown.value.status, unknown.value.body.error.code) == (404, "model_not_found")


def test_it_starts_and_stops_a_lifecycle(api: Any, client: tuple[Any, Any]) -> None:
    module, moestro = client
    api.configured()
    api.hold()
    assert [config.name for config in moestro.list_configs()] == ["small"]
    body = module.LifecycleRequest(config="small", changes={"branch.training.steps": 5})
    started = moestro.start_lifecycle(body)
    with pytest.raises(module.ApiError) as busy:
        moestro.start_lifecycle(body)
    assert (busy.value.status, busy.value.body.error.kind) == (409, "BusyError")
    api.order("progress")
    moestro.stop_lifecycle(started.id)
    assert moestro.read_lifecycle(started.id).state in {"stopping", "cancelled"}
    assert [one.id for one in moestro.list_lifecycles()] == [started.id]


def test_refusals_have_the_type_that_is_promised(client: tuple[Any, Any]) -> None:
    module, moestro = client
    calls: list[tuple[int, Callable[[], Any]]] = [
        (404, lambda: moestro.read_model("nothing")),
        (400, lambda: moestro.list_runs(limit=0)),
        (404, lambda: moestro.delete_version("nothing", "1")),
        (400, lambda: moestro.register_version("assistant", module.RegisterRequest(deployment="not one"))),
    ]
    for status, call in calls:
        with pytest.raises(module.ApiError) as refused:
            call()
        assert refused.value.status == status
        assert isinstance(refused.value.body, module.ErrorResponse)


def test_every_operation_is_in_it(api: Any, source: str) -> None:
    tree = ast.parse(source)
    (made,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Client")
    methods = {node.name for node in made.body if isinstance(node, ast.FunctionDef)}
    assert methods - {"__init__", "_call"} == {
        item["operationId"] for _, _, item in operations(api.assembled.described())
    }


@pytest.mark.slow
def test_its_types_hold_together(source: str, tmp_path: Path) -> None:
    path = tmp_path / "generated_client.py"
    path.write_text(source)
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--cache-dir", str(tmp_path / "cache")]
    done = subprocess.run([*command, str(path)], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
